//! What is logged of calls. A process of its own: what a thread listens for depends on what others have listened for.

#![expect(clippy::unwrap_used, reason = "in tests a panic is the right way to fail")]

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use petra_csi::proto::csi::CreateVolumeRequest;
use petra_csi::proto::csi::controller_client::ControllerClient;
use petra_csi::socket;
use petra_csi::telemetry::{Format, Metrics, Observe, Severity, event, logs};
use tokio::sync::oneshot;
use tonic::service::Routes;
use tonic::transport::Endpoint;
use tonic::{Code, Request};
use tracing_subscriber::layer::SubscriberExt;

#[derive(Clone, Debug, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        Write::write(&mut *self.0.lock().unwrap(), bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Lines {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

/// Logs of this thread, as a process with `--log-format` writes them.
fn listen(format: Format, filter: &str) -> (Lines, tracing::subscriber::DefaultGuard) {
    let lines = Lines::default();
    let writer = lines.clone();
    let layer = logs::lines(format, move || writer.clone());
    let filter = tracing_subscriber::EnvFilter::new(filter);
    let subscriber = tracing_subscriber::registry().with(filter).with(layer);
    (lines, tracing::subscriber::set_default(subscriber))
}

#[tokio::test]
async fn logs_say_what_was_called_and_no_secrets() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("csi.sock");
    for format in [Format::Json, Format::Text] {
        let (lines, _guard) = listen(format, "petra_csi=debug,event=info");
        let endpoint = format!("unix://{}", path.display());
        let (end, ended) = oneshot::channel::<()>();
        let (at, observe) = (endpoint.clone(), Observe::new(Metrics::new()));
        let serving = tokio::spawn(async move {
            socket::serve(&at, Routes::default(), observe, async move { drop(ended.await) }).await
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        let channel = Endpoint::from_shared(endpoint).unwrap().connect().await.unwrap();
        let mut client = ControllerClient::new(channel);
        let secrets = [("passphrase".to_owned(), "hunter2".to_owned())].into();
        let request = CreateVolumeRequest {
            name: "pvc-1".to_owned(),
            secrets,
            ..CreateVolumeRequest::default()
        };
        let mut request = Request::new(request);
        request.metadata_mut().insert("petra-request", "77".parse().unwrap());
        let refused = client.create_volume(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unimplemented);
        event(Severity::Warning, "UploadFailed", "main#@1", "the store is away");
        end.send(()).unwrap();
        serving.await.unwrap().unwrap();
        let text = lines.text();
        assert!(!text.contains("hunter2"), "{text}");
        for part in
            ["passphrase", "(hidden)", "pvc-1", "Controller/CreateVolume", "Unimplemented", "77"]
        {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        assert!(text.contains("UploadFailed") && text.contains("the store is away"));
        if format == Format::Json {
            let lines: Vec<serde_json::Value> =
                text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            let event = lines.iter().find(|line| line["target"] == "event").unwrap();
            assert_eq!(event["reason"], "UploadFailed");
            let done = lines.iter().find(|line| line["code"] == "Unimplemented").unwrap();
            assert_eq!(
                (&done["span"]["request"], &done["span"]["by"]),
                (&"1".into(), &"77".into())
            );
        }
    }
}
