//! The page for Prometheus, and those for probes.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::time::timeout;

use super::metrics::Metrics;
use super::pools::{Readings, Source};

/// What OpenMetrics is called.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// A pool or node that takes longer is left out.
const READ_LIMIT: Duration = Duration::from_secs(5);

#[derive(Clone, Debug)]
struct Site {
    metrics: Arc<Metrics>,
    source: Arc<dyn Source>,
}

/// The pages `/metrics`, `/healthz` and `/readyz`.
pub fn pages(metrics: Arc<Metrics>, source: Arc<dyn Source>) -> Router {
    Router::new()
        .route("/metrics", get(metrics_page))
        // A process that answers lives.
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready_page))
        .with_state(Site { metrics, source })
}

/// Serves the pages at an address until `shutdown`.
pub async fn serve(
    address: SocketAddr,
    pages: Router,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let listener = TcpListener::bind(address).await?;
    tracing::info!(address = %listener.local_addr()?, "metrics are served");
    axum::serve(listener, pages).with_graceful_shutdown(shutdown).await
}

async fn metrics_page(State(site): State<Site>) -> Response {
    let readings = timeout(READ_LIMIT, site.source.read()).await.unwrap_or_else(|_| {
        tracing::warn!("values for metrics take too long");
        Readings::default()
    });
    match site.metrics.text(&readings) {
        Ok(text) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn ready_page(State(site): State<Site>) -> Response {
    let ready = timeout(READ_LIMIT, site.source.ready()).await;
    match ready.unwrap_or_else(|_| Err("it takes too long to find out".to_owned())) {
        Ok(()) => "ok\n".into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}
