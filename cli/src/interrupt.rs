//! Signals: the first one asks the operation to end cleanly, the second ends the process.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::failure::Exit;
use crate::output::Output;

/// Watches for Ctrl-C and for the polite end that service managers ask for, as long as the process lives.
pub fn watch(cancel: CancellationToken, output: Output) {
    let (Ok(mut interrupt), Ok(mut terminate)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        // The signals keep their default effect: they end the process at once, which is safe as well.
        return;
    };
    tokio::spawn(async move {
        let mut next = async || {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        };
        next().await;
        cancel.cancel();
        output.say("cancelling; once more ends at once");
        next().await;
        std::process::exit(Exit::Cancelled.code().into());
    });
}
