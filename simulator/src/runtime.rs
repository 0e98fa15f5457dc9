//! Time and tasks of a run: the world of `raft::sim`, by thread.

use std::cell::RefCell;
use std::future::Future;
use std::time::Duration;

use controller::ids::HostId;
use raft::sim::World;

thread_local! {
    static SIM: RefCell<Option<World>> = const { RefCell::new(None) };
}

/// Runs a simulation to its end; its digest is that of all messages and disks.
pub(crate) fn run<T, F: Future<Output = T>>(seed: u64, main: impl FnOnce() -> F) -> (T, u64) {
    let result = raft::sim::run(seed, |sim| {
        SIM.set(Some(sim));
        main()
    });
    SIM.set(None);
    result
}

/// The run on this thread.
pub(crate) fn sim() -> World {
    SIM.with_borrow(Clone::clone).expect("only a run calls this")
}

/// Since the start of the run.
pub(crate) fn now() -> Duration {
    sim().now()
}

/// Pauses.
pub(crate) async fn sleep(duration: Duration) {
    sim().sleep(duration).await;
}

/// Starts a task that nothing ends but the run.
pub(crate) fn spawn(task: impl Future<Output = ()> + Send + 'static) {
    drop(sim().spawn(task));
}

/// Starts a task of a host's node; it ends with the node, wherever it is.
pub(crate) fn spawn_on(host: HostId, task: impl Future<Output = ()> + Send + 'static) {
    drop(sim().node(host.0).spawn(task));
}
