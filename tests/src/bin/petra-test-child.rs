//! What tests start as a process of its own, to kill it or to give it another environment.
//!
//! ```text
//! petra-test-child snapshot|restore DIR     again and again, until it is killed
//! petra-test-child credentials ENDPOINT     prints how an S3 store fails that finds none in the environment
//! ```

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "in tests a panic is the right way to fail"
)]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use petra_engine::Repository;
use petra_engine::restore::{RestoreOptions, restore};
use petra_engine::snapshot::snapshot;
use petra_engine::source::FileSource;
use petra_engine::store::{LocalStore, S3Store};
use petra_engine::target::FileTarget;
use petra_engine::url::{Item, RepositoryUrl};
use petra_tests::lab::{context, name, request_of};
use petra_tests::outcomes::causes;

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (verb, place) = (arguments[0].as_str(), arguments[1].as_str());
    if verb == "credentials" {
        return credentials(place).await;
    }
    let dir = Path::new(place);
    let repo = Repository::open(Arc::new(LocalStore::new(&dir.join("repo")))).await.unwrap();
    // Whoever should kill it may have died first.
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(20) {
        match verb {
            "snapshot" => take(&repo, dir).await,
            "restore" => bring_back(&repo, dir).await,
            _ => panic!("{verb} is none of the words above"),
        }
    }
}

async fn take(repo: &Repository, dir: &Path) {
    let source = FileSource::open(&dir.join("source")).unwrap();
    let request = request_of("r", vec![(name("v"), Arc::new(source))]);
    snapshot(repo, request, &context()).await.unwrap();
}

async fn bring_back(repo: &Repository, dir: &Path) {
    let all = repo.snapshots(&Item::Repository).await.unwrap();
    let record = &all[0].volumes[0];
    let path = dir.join("target");
    let target = FileTarget::create(&path, record.len_bytes).unwrap();
    restore(repo, record, target, &RestoreOptions::default(), &context()).await.unwrap();
    std::fs::remove_file(&path).unwrap();
}

async fn credentials(url: &str) {
    let Ok(RepositoryUrl::S3(location)) = url.parse() else { panic!("{url} is no bucket") };
    for (operation, outcome) in causes(&S3Store::connect(&location).await.unwrap()).await {
        println!("{operation}: {:?}", outcome.unwrap_err());
    }
    let on_aws = petra_engine::url::S3Location { endpoint: None, ..location };
    println!("on AWS: {}", S3Store::connect(&on_aws).await.unwrap_err());
}
