//! [`Node`]: a machine that can die at any await point of its tasks and start again.

use std::{
    cell::RefCell,
    fmt,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use openraft_rt_sim::{SimJoinHandle, SimRuntime};

use super::{
    runtime,
    world::{World, current as world},
};
use crate::{
    NodeId,
    sim_disk::{Loss, SimDisk},
};

/// Dead tasks are struck off once this many are listed.
const TASKS_LISTED: usize = 64;

thread_local! {
    static CURRENT: RefCell<Option<Arc<Life>>> = const { RefCell::new(None) };
}

/// The life of the node that the running code belongs to.
pub(crate) fn current() -> Option<Arc<Life>> {
    CURRENT.try_with(|current| current.borrow().clone()).ok().flatten()
}

/// Puts the previous owner back, also when a task panics.
struct Entered(Option<Arc<Life>>);

impl Entered {
    fn new(life: Option<Arc<Life>>) -> Self {
        Self(CURRENT.with(|current| current.replace(life)))
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let previous = self.0.take();
        let _ = CURRENT.try_with(|current| current.replace(previous));
    }
}

/// Runs something that belongs to no node.
pub(super) fn outside<T>(work: impl FnOnce() -> T) -> T {
    let _entered = Entered::new(None);
    work()
}

/// A machine between two deaths.
pub(crate) struct Life {
    pub(crate) id: NodeId,
    alive: AtomicBool,
    tasks: Mutex<Vec<Weak<dyn Mortal>>>,
}

trait Mortal: Send + Sync {
    fn die(&self);
}

impl Life {
    fn new(id: NodeId) -> Arc<Self> {
        Arc::new(Self { id, alive: AtomicBool::new(true), tasks: Mutex::default() })
    }

    fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Relaxed)
    }

    fn list(&self, task: Weak<dyn Mortal>) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        if tasks.len() >= TASKS_LISTED && tasks.len().is_power_of_two() {
            tasks.retain(|task| task.strong_count() > 0);
        }
        tasks.push(task);
    }

    /// Drops every task where it stands.
    pub(super) fn end(self: &Arc<Self>) {
        self.alive.store(false, Ordering::Relaxed);
        let tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        let _entered = Entered::new(Some(self.clone()));
        for task in tasks.iter().filter_map(Weak::upgrade) {
            task.die();
        }
    }
}

/// A task that dies with its node.
pub(super) struct Scoped<F> {
    life: Arc<Life>,
    slot: Arc<Slot<F>>,
}

struct Slot<F>(Mutex<Option<Pin<Box<F>>>>);

impl<F: Send> Mortal for Slot<F> {
    fn die(&self) {
        // A task that is just running is dropped when its turn ends.
        if let Ok(mut future) = self.0.try_lock() {
            let future = future.take();
            drop(future);
        }
    }
}

impl<F: Future + Send + 'static> Scoped<F> {
    pub(super) fn new(life: Arc<Life>, future: F) -> Self {
        let slot = Arc::new(Slot(Mutex::new(Some(Box::pin(future)))));
        let listed: Weak<dyn Mortal> = Arc::downgrade(&(slot.clone() as Arc<dyn Mortal>));
        life.list(listed);
        Self { life, slot }
    }
}

impl<F: Future + Send + 'static> Future for Scoped<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let _entered = Entered::new(Some(self.life.clone()));
        let mut future = self.slot.0.lock().unwrap_or_else(PoisonError::into_inner);
        let polled = match future.as_mut() {
            Some(future) if self.life.is_alive() => future.as_mut().poll(context),
            _ => Poll::Pending,
        };
        if polled.is_ready() || !self.life.is_alive() {
            let ended = future.take();
            drop(future);
            drop(ended);
        }
        polled
    }
}

/// What of a node outlives its deaths.
pub(super) struct Machine {
    pub(super) life: Arc<Life>,
    pub(super) disk: SimDisk,
    pub(super) skew_ms: i64,
}

impl Machine {
    pub(super) fn new(id: NodeId, seed: u64) -> Self {
        let disk = SimDisk::new(seed ^ id.wrapping_mul(0x9e37_79b9));
        Self { life: Life::new(id), disk, skew_ms: 0 }
    }
}

/// A node of a [`World`]. Clones are the same node.
#[derive(Clone)]
pub struct Node {
    pub(super) id: NodeId,
    pub(super) machine: Arc<Mutex<Machine>>,
    pub(super) world: World,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Node {
    fn with<T>(&self, look: impl FnOnce(&mut Machine) -> T) -> T {
        look(&mut self.machine.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Its id.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// Whether it runs.
    pub fn is_alive(&self) -> bool {
        self.with(|machine| machine.life.is_alive())
    }

    /// Its disk; after a death, what is left of it.
    pub fn disk(&self) -> SimDisk {
        self.with(|machine| machine.disk.clone())
    }

    /// Gives it another disk, as when one is replaced or wiped.
    pub fn replace_disk(&self, disk: SimDisk) {
        self.with(|machine| machine.disk = disk);
    }

    /// How far its wall clock is off.
    pub fn set_skew_ms(&self, skew_ms: i64) {
        self.with(|machine| machine.skew_ms = skew_ms);
    }

    /// Runs a task of this node: it sees the node's disk, clock and links, so do the tasks that it
    /// spawns, and all of them end when the node dies.
    pub fn spawn<F>(&self, future: F) -> Task<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.process().spawn(future)
    }

    /// The process that runs on it now.
    pub fn process(&self) -> Process {
        Process(self.with(|machine| machine.life.clone()))
    }

    /// Kills it where it stands. What its disk keeps of unflushed writes, `loss` says. It lives
    /// again, with nothing running, at once; [`Node::spawn`] starts it.
    pub fn kill(&self, loss: Loss) {
        let (life, disk) = self.with(|machine| (machine.life.clone(), machine.disk.clone()));
        self.world.note("kill", &self.id.to_le_bytes());
        disk.power_off();
        life.end();
        self.world.net().forget(self.id);
        self.with(|machine| {
            machine.disk = disk.crash(loss);
            machine.life = Life::new(self.id);
        });
    }
}

/// What runs on a node from its start to its death. Clones are the same process.
#[derive(Clone)]
pub struct Process(Arc<Life>);

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Process").field("node", &self.0.id).finish_non_exhaustive()
    }
}

impl Process {
    /// Runs a task in this process, as [`Node::spawn`] does; nothing comes of it when the process
    /// is dead, whatever runs on the node by then.
    pub fn spawn<F>(&self, future: F) -> Task<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let _entered = Entered::new(Some(self.0.clone()));
        Task::new(runtime::spawn_here(future))
    }
}

/// A spawned task; dropping it lets the task run on.
pub struct Task<T>(SimJoinHandle<T>);

impl<T> Task<T> {
    pub(super) fn new(handle: SimJoinHandle<T>) -> Self {
        Self(handle)
    }
}

impl<T> fmt::Debug for Task<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Task").finish_non_exhaustive()
    }
}

impl<T: Send + 'static> Future for Task<T> {
    type Output = T;

    /// Never ready when the task's node died; a panic of the task goes on here.
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        match Pin::new(&mut self.0).poll(context) {
            Poll::Ready(Ok(output)) => Poll::Ready(output),
            Poll::Ready(Err(openraft_rt_sim::SimJoinError::Panic(message))) => {
                panic!("a simulated task panicked: {message}")
            }
            Poll::Ready(Err(openraft_rt_sim::SimJoinError::Cancelled)) | Poll::Pending => {
                Poll::Pending
            }
        }
    }
}

/// The owner of what is spawned now.
pub(super) fn owner() -> Option<Arc<Life>> {
    world().and_then(|_| current())
}

/// Spawns on the simulated executor without an owner.
pub(super) fn spawn_free<F>(future: F) -> SimJoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    <SimRuntime as openraft::AsyncRuntime>::spawn(future)
}
