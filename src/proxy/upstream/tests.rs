use tokio::net::TcpListener;
use tokio::task::{LocalSet, yield_now};
use tokio::time::advance;

use super::*;

/// An engine that takes connections and says nothing.
struct Silent {
    listener: TcpListener,
    address: SocketAddr,
}

impl Silent {
    async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("its address");
        Self { listener, address }
    }

    /// Both ends of a connection: the pool's, and the engine's.
    async fn connection(&self) -> (Rc<Socket>, TcpStream) {
        let ours = connect(self.address).await.expect("a connection");
        (Rc::new(Socket::from(ours)), self.listener.accept().await.expect("the same").0)
    }
}

/// A test of a fresh pool beside an engine.
async fn with_pool(test: impl AsyncFnOnce(Silent, Rc<Pool>)) {
    LocalSet::new().run_until(async { test(Silent::new().await, Rc::default()).await }).await;
}

/// Lets everything have its turn that is due now, without the clock moving on.
async fn settle(pool: &Pool, idle: usize) {
    for _ in 0..100_000 {
        yield_now().await;
        if pool.idle.borrow().len() == idle {
            break;
        }
    }
    assert_eq!(pool.idle.borrow().len(), idle);
}

#[tokio::test(start_paused = true)]
async fn idle_connections_go_before_the_engine_closes_them_and_the_last_ends_the_watch() {
    assert!(IDLE < Duration::from_secs(5), "SGLang's server closes them then");
    with_pool(async |engine, pool| {
        let (ours, theirs) = engine.connection().await;
        pool.keep(ours, engine.address);
        settle(&pool, 1).await;
        advance(IDLE.saturating_sub(Duration::from_millis(1))).await;
        let Connection { socket, history } = pool.take(engine.address, Repeat::Possible).expect("still kept");
        assert_eq!(history, History::Reused);
        pool.keep(socket, engine.address);
        advance(IDLE).await;
        assert!(pool.take(engine.address, Repeat::Possible).is_none(), "too old");
        settle(&pool, 0).await;
        advance(IDLE).await;
        for _ in 0..100 {
            yield_now().await;
        }
        assert!(matches!(*pool.sweeper.borrow(), Sweeper::None), "somebody still watches over nothing");
        drop(theirs);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_the_engine_closes_goes_at_once() {
    with_pool(async |engine, pool| {
        let (first, theirs) = engine.connection().await;
        let (second, _open) = engine.connection().await;
        pool.keep(first, engine.address);
        settle(&pool, 1).await;
        // Kept while the watch waits already, as well.
        pool.keep(second, engine.address);
        drop(theirs);
        settle(&pool, 1).await;
        assert!(pool.take(engine.address, Repeat::Possible).is_some(), "the other one is good");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_said_again_gets_no_connection_that_the_engine_may_be_closing() {
    with_pool(async |engine, pool| {
        let (ours, _theirs) = engine.connection().await;
        pool.keep(ours, engine.address);
        settle(&pool, 1).await;
        let young = pool.take(engine.address, Repeat::No).expect("just used");
        pool.keep(young.socket, engine.address);
        advance(YOUNG).await;
        assert!(pool.take(engine.address, Repeat::No).is_none());
        assert!(pool.take(engine.address, Repeat::Possible).is_some(), "it stays for others");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn an_old_connection_is_asked_for_its_end_before_it_is_taken() {
    with_pool(async |engine, pool| {
        let (ours, theirs) = engine.connection().await;
        pool.keep(ours, engine.address);
        settle(&pool, 1).await;
        advance(YOUNG).await;
        // Nobody has a turn from here on: only the kernel knows.
        drop(theirs);
        let ended = |idle: &Idle| idle.socket.option().peek(&mut [MaybeUninit::uninit()]).is_ok();
        while !ended(&pool.idle.borrow()[0]) {
            std::thread::yield_now();
        }
        assert!(pool.take(engine.address, Repeat::Possible).is_none());
    })
    .await;
}

#[tokio::test]
async fn an_engine_that_is_not_there_is_said_to_be_unreachable() {
    let address = Silent::new().await.address;
    let error = connect(address).await.expect_err("nobody listens");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
}
