use std::sync::Mutex;

use super::*;
use crate::chunker::Chunking;
use crate::error::{Error, ErrorKind};
use crate::store::MemoryStore;
use crate::{Repository, store};

/// How a store treats creates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Creates {
    /// As promised.
    Kept,
    /// As promised, but nobody hears that they won.
    WinnerNotTold,
    /// The condition is ignored: the last one wins, and all are told that they did.
    LastWins,
    /// The first one wins, and all are told that they did.
    AllTold,
    /// It looks whether there is an object, and writes a moment later.
    LooksFirst,
    /// The first one is told that it won, the last one does.
    Overwrites,
    /// Won, and not to be found.
    Unseen,
    /// Conditions are not known.
    Refuses,
    /// The store is away.
    Away,
}

#[derive(Debug)]
struct Lax {
    inner: MemoryStore,
    creates: Mutex<Creates>,
    requests: Mutex<Vec<String>>,
}

impl Lax {
    fn new(creates: Creates) -> Arc<Self> {
        let requests = Mutex::default();
        Arc::new(Self { inner: MemoryStore::new(), creates: creates.into(), requests })
    }

    fn turn(&self, creates: Creates) {
        *self.creates.lock().unwrap() = creates;
        self.requests.lock().unwrap().clear();
    }

    /// What a plain PUT does where objects may change.
    async fn overwrite(&self, key: &Key, body: Bytes) -> Result<(), StoreError> {
        self.inner.delete(key).await?;
        self.inner.put(key, body).await
    }

    fn note(&self, operation: &str, key: &Key) {
        let folder = key.as_str().split('/').next().unwrap();
        self.requests.lock().unwrap().push(format!("{operation} {folder}"));
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }

    fn error(&self, key: &Key, cause: StoreErrorCause) -> StoreError {
        let (location, detail) = (self.location(), "says the test".to_owned());
        StoreError { operation: "create", key: key.to_string(), location, cause, detail }
    }
}

fn is_probe(key: &Key) -> bool {
    key.as_str().starts_with(crate::key::PROBE)
}

#[async_trait]
impl Store for Lax {
    fn location(&self) -> String {
        "lax:".to_owned()
    }

    async fn get(&self, key: &Key) -> Result<Bytes, StoreError> {
        self.note("get", key);
        let is_unseen = *self.creates.lock().unwrap() == Creates::Unseen && is_probe(key);
        if is_unseen {
            Err(self.error(key, StoreErrorCause::NotFound))
        } else {
            self.inner.get(key).await
        }
    }

    async fn get_range(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.inner.get_range(key, range).await
    }

    async fn put(&self, key: &Key, body: Bytes) -> Result<(), StoreError> {
        self.note("put", key);
        self.inner.put(key, body).await
    }

    async fn create(&self, key: &Key, body: Bytes) -> Result<Creation, StoreError> {
        self.note("create", key);
        let creates = *self.creates.lock().unwrap();
        match creates {
            Creates::Kept | Creates::Unseen => self.inner.create(key, body).await,
            Creates::WinnerNotTold => self.inner.create(key, body).await.map(|_| Creation::Exists),
            Creates::LastWins => self.overwrite(key, body).await.map(|()| Creation::Created),
            Creates::AllTold => self.inner.create(key, body).await.map(|_| Creation::Created),
            Creates::LooksFirst => {
                if self.inner.get(key).await.is_ok() {
                    return Ok(Creation::Exists);
                }
                tokio::task::yield_now().await;
                self.overwrite(key, body).await.map(|()| Creation::Created)
            }
            Creates::Overwrites => {
                let told = self.inner.create(key, body.clone()).await;
                self.overwrite(key, body).await?;
                told
            }
            Creates::Refuses => Err(self.error(key, StoreErrorCause::Unsupported)),
            Creates::Away => Err(self.error(key, StoreErrorCause::Unavailable)),
        }
    }

    async fn list(&self, prefix: &str, after: Option<&str>) -> Result<Page, StoreError> {
        self.inner.list(prefix, after).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.note("delete", key);
        self.inner.delete(key).await
    }
}

const BROKEN: [(Creates, &str); 6] = [
    (Creates::LastWins, "creates of one object"),
    (Creates::AllTold, "creates of one object"),
    (Creates::LooksFirst, "creates of one object"),
    (Creates::Overwrites, "does not hold what its creator wrote"),
    (Creates::Unseen, "is not there"),
    (Creates::Refuses, "no conditional writes (says the test)"),
];

async fn init(store: Arc<Lax>, writers: Writers) -> crate::Result<Repository> {
    Repository::init_for(writers, store, Chunking::default(), &Context::default()).await
}

fn assert_refused<T: std::fmt::Debug>(result: Result<T, Error>, how: &str) {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Fix, "{error}");
    let text = error.to_string();
    assert!(text.contains("lax:") && text.contains(how), "{text}");
    let Error::Store(error) = error else { panic!("{error}") };
    assert_eq!(error.cause, StoreErrorCause::NotExclusive);
}

#[tokio::test]
async fn no_repository_is_made_where_several_creates_win() {
    for (creates, how) in BROKEN {
        let store = Lax::new(creates);
        assert_refused(init(store.clone(), Writers::Many).await, how);
        let left = store::list_all(&store.inner, "").await.unwrap();
        assert_eq!(left, [], "{creates:?}");
    }
}

#[tokio::test]
async fn a_store_that_keeps_its_promise_passes() {
    for creates in [Creates::Kept, Creates::WinnerNotTold] {
        let store = Lax::new(creates);
        init(store.clone(), Writers::Many).await.unwrap();
        let left = store::list_all(&store.inner, "").await.unwrap();
        assert_eq!(left.len(), 1, "only the configuration: {left:?}");
    }
}

#[tokio::test]
async fn a_repository_is_probed_once_and_before_anything_is_created() {
    let ctx = Context::default();
    let store = Lax::new(Creates::Kept);
    init(store.clone(), Writers::Many).await.unwrap();
    store.turn(Creates::Kept);
    let repo = Repository::open(store.clone()).await.unwrap();
    let key = Key::from_listing("marks/x".to_owned());
    assert_eq!(store.requests(), ["get config"]);
    repo.store().create(&key, Bytes::from_static(b"1")).await.unwrap();
    let expected = ["get config", "create probe", "create probe", "create probe"];
    let then = ["create probe", "get probe", "delete probe", "create marks"];
    assert_eq!(store.requests(), [&expected[..], &then].concat());
    for _ in 0..3 {
        repo.ready_to_write(&ctx).await.unwrap();
        repo.store().create(&key, Bytes::from_static(b"2")).await.unwrap();
    }
    assert_eq!(store.requests().iter().filter(|request| request.ends_with("probe")).count(), 6);
}

#[tokio::test]
async fn a_repository_behind_a_bad_endpoint_can_only_be_read() {
    let ctx = Context::default();
    for (creates, how) in BROKEN {
        let store = Lax::new(Creates::Kept);
        init(store.clone(), Writers::Many).await.unwrap();
        store.turn(creates);
        let repo = Repository::open(store.clone()).await.unwrap();
        assert!(repo.experiments().await.unwrap().is_empty());
        assert_refused(repo.ready_to_write(&ctx).await, how);
        let (key, body) = (Key::from_listing("packs/x".to_owned()), Bytes::new());
        for refused in [
            repo.store().create(&key, body.clone()).await.map(drop),
            repo.store().put(&key, body).await,
            repo.store().delete(&key).await,
        ] {
            assert_refused(refused.map_err(Error::from), how);
        }
        assert_refused(repo.delete(ctx.host.new_id(), &ctx).await, how);
        assert_refused(repo.undelete(ctx.host.new_id(), &ctx).await, how);
        assert_refused(repo.set_policy(None, None, &ctx).await, how);
        // It is remembered: a race that is won by chance the next time would say nothing.
        store.turn(Creates::Kept);
        assert_refused(repo.ready_to_write(&ctx).await, how);
    }
}

#[tokio::test]
async fn a_failed_probe_is_no_verdict() {
    let ctx = Context::default();
    let store = Lax::new(Creates::Kept);
    init(store.clone(), Writers::Many).await.unwrap();
    let repo = Repository::open(store.clone()).await.unwrap();
    store.turn(Creates::Away);
    assert_eq!(repo.ready_to_write(&ctx).await.unwrap_err().kind(), ErrorKind::Retry);
    store.turn(Creates::Kept);
    repo.ready_to_write(&ctx).await.unwrap();
}

#[tokio::test]
async fn a_single_writer_takes_any_store() {
    let ctx = Context::default();
    for (creates, _) in BROKEN {
        let store = Lax::new(creates);
        init(store.clone(), Writers::Single).await.unwrap();
        let repo = Repository::open(store.clone()).await.unwrap();
        assert_eq!(repo.config().writers, Writers::Single);
        repo.ready_to_write(&ctx).await.unwrap();
        let key = Key::from_listing("marks/x".to_owned());
        let create = |body: &'static str| repo.store().create(&key, Bytes::from(body));
        assert_eq!(create("1").await.unwrap(), Creation::Created);
        assert_eq!(create("2").await.unwrap(), Creation::Exists);
        assert_eq!(repo.store().get(&key).await.unwrap(), "1");
        assert!(!store.requests().iter().any(|request| request.starts_with("create")));
        assert!(init(store, Writers::Single).await.is_err(), "there is one already");
    }
}

/// Memory and directories are known; only making a repository tries them.
#[tokio::test]
async fn a_known_store_is_not_probed_again() {
    let store = Arc::new(MemoryStore::new());
    let ctx = Context::default();
    Repository::init(store.clone(), Chunking::default(), &ctx).await.unwrap();
    let opened = CheckedStore::new(store, Writers::Many);
    assert_eq!(opened.verdict.get(), Some(&Verdict::Kept));
}

#[tokio::test]
async fn what_a_killed_probe_left_does_not_stand_in_the_way() {
    let store = Lax::new(Creates::Kept);
    store.put(&Key::probe("0123"), Bytes::from_static(b"petra probe 0\n")).await.unwrap();
    init(store, Writers::Many).await.unwrap();
}
