//! Ending without breaking off what is under way.

use std::future::{Future, pending};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// How long calls may go on after the end was asked for: less than the 30 seconds that Kubernetes gives a pod.
pub(crate) const END_LIMIT: Duration = Duration::from_secs(25);

/// Ends at the first SIGTERM or SIGINT.
pub async fn asked_to_end() {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        // Without handlers, the signals end the process by themselves.
        return pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// Runs a server that takes no more calls after `shutdown` and ends with the last one under way, or after a while in any
/// case. The server gets a future that says when.
pub async fn serve_until<E, S: Future<Output = Result<(), E>>>(
    shutdown: impl Future<Output = ()> + Send + 'static,
    serve: impl FnOnce(BoxFuture<'static, ()>) -> S,
) -> Result<(), E> {
    let (ending, ended) = oneshot::channel();
    let serving = serve(
        async move {
            shutdown.await;
            tracing::info!("no more calls are taken");
            // The server is not there any more: nothing to limit.
            let _ = ending.send(());
        }
        .boxed(),
    );
    let too_long = async {
        if ended.await.is_err() {
            pending::<()>().await;
        }
        tokio::time::sleep(END_LIMIT).await;
    };
    tokio::select! {
        served = serving => served,
        () = too_long => {
            tracing::warn!("calls that took too long were given up");
            Ok(())
        }
    }
}
