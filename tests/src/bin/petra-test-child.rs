//! What tests start as a process of its own, to kill it or to give it another environment.
//!
//! ```text
//! petra-test-child snapshot|restore DIR     again and again, until it is killed
//! petra-test-child volumes POOL             makes, copies, clones and deletes volumes until it is killed
//! petra-test-child credentials ENDPOINT     prints how an S3 store fails that finds none in the environment
//! petra-test-child image-server DIR ...     serves a lazy image (see `petra_tests::lazy`)
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
use petra_engine::context::SystemHost;
use petra_engine::restore::{RestoreOptions, restore};
use petra_engine::snapshot::snapshot;
use petra_engine::source::FileSource;
use petra_engine::store::{LocalStore, S3Store};
use petra_engine::target::FileTarget;
use petra_engine::url::{Item, RepositoryUrl};
use petra_tests::lab::{context, name, request_of};
use petra_tests::outcomes::causes;
use petra_tests::pool::volume_name;
use petra_volume::Pool;
use petra_volume::pool::{Content, CreateRequest, Filesystem};

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (verb, place) = (arguments[0].as_str(), arguments[1].as_str());
    match verb {
        "credentials" => return credentials(place).await,
        "volumes" => return volumes(Path::new(place)),
        _ => {}
    }
    if verb == "image-server" {
        return petra_tests::lazy::image_server(&arguments[1..]);
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

fn volumes(pool: &Path) {
    let pool = Pool::open(pool, Arc::new(SystemHost)).unwrap();
    let started = Instant::now();
    for round in 0.. {
        if started.elapsed() > Duration::from_secs(20) {
            return;
        }
        let request = |name: String| {
            let name = volume_name(&name);
            CreateRequest::new(name, 16 << 20, Filesystem::Raw)
        };
        let id = std::process::id();
        let volume = pool.create(request(format!("a {id} {round}"))).unwrap();
        let mut locked = volume.lock().unwrap();
        let device = locked.attach(false).unwrap().device;
        std::fs::write(&device, vec![7; 1 << 20]).unwrap();
        let copy = locked.begin_copy().unwrap();
        copy.finish().unwrap();
        let copy = locked.keep_copy(copy, |_| {}).unwrap();
        let content = Content::CopyOf(volume.copy(copy));
        let request = request(format!("b {id} {round}"));
        let clone = pool.create(CreateRequest { content, ..request }).unwrap();
        locked.delete_copy(copy).unwrap();
        locked.detach().unwrap();
        locked.delete(true).unwrap();
        // Some stay.
        if round % 3 > 0 {
            clone.lock().unwrap().delete(true).unwrap();
        }
    }
}

async fn credentials(url: &str) {
    let Ok(RepositoryUrl::S3(location)) = url.parse() else { panic!("{url} is no bucket") };
    for (operation, outcome) in causes(&S3Store::connect(&location).await.unwrap()).await {
        println!("{operation}: {:?}", outcome.unwrap_err());
    }
    let on_aws = petra_engine::url::S3Location { endpoint: None, ..location };
    println!("on AWS: {}", S3Store::connect(&on_aws).await.unwrap_err());
}
