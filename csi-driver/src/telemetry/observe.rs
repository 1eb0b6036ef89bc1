//! The layer around all calls: gives them numbers, logs and counts them.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::{BodyExt, Full, Limited};
use tonic::body::Body;
use tonic::codegen::http::{HeaderMap, Request, Response};
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::{Instrument, Span};

use super::describe::{self, Method};
use super::metrics::Metrics;
use crate::agent::remote::REQUEST as REQUEST_HEADER;

/// Longer requests are refused when they are logged. gRPC would refuse them as well.
const MAX_REQUEST_BYTES: usize = 4 << 20;
/// The longest number of a call that is believed to be one.
const MAX_ID_BYTES: usize = 32;
/// Calls that come every few seconds. That they went well is not worth a line.
const FREQUENT: [&str; 8] = [
    "Identity/Probe",
    "Identity/GetPluginInfo",
    "Identity/GetPluginCapabilities",
    "Controller/ControllerGetCapabilities",
    "Controller/GetCapacity",
    "Node/NodeGetCapabilities",
    "Node/NodeGetVolumeStats",
    "NodeAgent/GetInfo",
];

tokio::task_local! {
    static REQUEST: String;
}

/// The number of the call that this task serves.
pub fn current_request() -> Option<String> {
    REQUEST.try_with(Clone::clone).ok()
}

/// The layer. Its clones count together.
#[derive(Clone, Debug)]
pub struct Observe {
    metrics: Arc<Metrics>,
    next: Arc<AtomicU64>,
}

impl Observe {
    /// Counts in these metrics.
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self { metrics, next: Arc::new(AtomicU64::new(1)) }
    }
}

impl<S> Layer<S> for Observe {
    type Service = Observed<S>;

    fn layer(&self, inner: S) -> Observed<S> {
        Observed { inner, observe: self.clone() }
    }
}

/// A service whose calls are observed.
#[derive(Clone, Debug)]
pub struct Observed<S> {
    inner: S,
    observe: Observe,
}

impl<S> Service<Request<Body>> for Observed<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        // The one that was found to be ready is used, the other one next time.
        let next = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, next);
        let method = describe::method(request.uri().path());
        let name = method.map_or(describe::UNKNOWN, |method| method.name.as_str());
        let id = self.observe.next.fetch_add(1, Ordering::Relaxed).to_string();
        let span = match asked_by(request.headers()) {
            Some(by) => tracing::info_span!("call", request = id, by, method = name),
            None => tracing::info_span!("call", request = id, method = name),
        };
        let call = Call::begin(self.observe.metrics.clone(), name, span.clone());
        let served = async move {
            let request = match method {
                Some(method) if tracing::enabled!(tracing::Level::DEBUG) => {
                    match described(method, request).await {
                        Ok(request) => request,
                        Err(status) => return Ok(call.observe(status.into_http())),
                    }
                }
                _ => request,
            };
            Ok(call.observe(inner.call(request).await?))
        };
        Box::pin(REQUEST.scope(id, served).instrument(span))
    }
}

/// The number of the call of a controller on whose behalf this one is.
fn asked_by(headers: &HeaderMap) -> Option<&str> {
    let id = headers.get(REQUEST_HEADER)?.to_str().ok()?;
    let is_id = id.len() <= MAX_ID_BYTES && id.bytes().all(|byte| byte.is_ascii_alphanumeric());
    is_id.then_some(id)
}

/// Logs a request.
async fn described(
    method: &'static Method,
    request: Request<Body>,
) -> Result<Request<Body>, Status> {
    let (head, body) = request.into_parts();
    let Ok(body) = Limited::new(body, MAX_REQUEST_BYTES).collect().await else {
        return Err(Status::resource_exhausted("the request is too long, or was cut off"));
    };
    let bytes = body.to_bytes();
    tracing::debug!(message = method.describe(&bytes), "called");
    Ok(Request::from_parts(head, Body::new(Full::new(bytes))))
}

/// A call that is under way. Its end is logged and counted when this is dropped.
#[derive(Debug)]
struct Call {
    metrics: Arc<Metrics>,
    method: &'static str,
    span: Span,
    started: Instant,
    outcome: Option<Status>,
}

impl Call {
    fn begin(metrics: Arc<Metrics>, method: &'static str, span: Span) -> Self {
        metrics.begin(method);
        Self { metrics, method, span, started: Instant::now(), outcome: None }
    }

    /// Follows the answer to its end, where the code is.
    fn observe(mut self, response: Response<Body>) -> Response<Body> {
        // An answer without a message has it at the beginning.
        self.note(response.headers());
        response.map(|body| Body::new(Answer { body, call: self }))
    }

    fn note(&mut self, headers: &HeaderMap) {
        if let Some(status) = Status::from_header_map(headers) {
            self.outcome = Some(status);
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let took = self.started.elapsed();
        // Without a code the caller went away before there was one.
        let cancelled = || Status::cancelled("the caller did not wait");
        let status = self.outcome.take().unwrap_or_else(cancelled);
        self.metrics.end(self.method, status.code(), took);
        let _entered = self.span.enter();
        log(self.method, &status, took);
    }
}

fn log(method: &str, status: &Status, took: Duration) {
    let (code, error) = (status.code(), status.message());
    let seconds = took.as_secs_f64();
    match code {
        Code::Ok if FREQUENT.contains(&method) => tracing::debug!(?code, seconds, "done"),
        Code::Ok => tracing::info!(?code, seconds, "done"),
        // The caller knows what to do about these.
        Code::Aborted | Code::Cancelled | Code::NotFound | Code::Unimplemented => {
            tracing::info!(?code, seconds, error, "not done");
        }
        Code::Internal | Code::Unknown | Code::DataLoss => {
            tracing::error!(?code, seconds, error, "failed");
        }
        _ => tracing::warn!(?code, seconds, error, "not done"),
    }
}

/// An answer that is followed to its end.
struct Answer {
    body: Body,
    call: Call,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_ref() {
                    self.call.note(trailers);
                }
            }
            Some(Err(status)) => self.call.outcome = Some(status.clone()),
            None => {}
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
