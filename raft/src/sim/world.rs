//! [`World`]: everything that one simulated run shares.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use openraft::AsyncRuntime;
use openraft_rt_sim::{SimInstant, SimRuntime};

use super::{
    net::{Link, Net},
    node::{Life, Machine, Node, Task, outside},
};
use crate::NodeId;

/// What the wall clocks show when a run begins.
const START_UNIX_MS: u64 = 1_800_000_000_000;

thread_local! {
    static CURRENT: RefCell<Option<World>> = const { RefCell::new(None) };
}

/// The world that runs on this thread.
pub(crate) fn current() -> Option<World> {
    CURRENT.try_with(|current| current.borrow().clone()).ok().flatten()
}

struct Installed;

impl Drop for Installed {
    fn drop(&mut self) {
        let _ = CURRENT.try_with(|current| current.borrow_mut().take());
    }
}

/// Runs `main` in a world of its own, to its end; what still runs then is dropped. Returns what it
/// returned and the run's digest.
pub fn run<T, F: Future<Output = T>>(seed: u64, main: impl FnOnce(World) -> F) -> (T, u64) {
    let world = World::new(seed);
    let mut runtime = SimRuntime::with_seed(seed);
    CURRENT.with(|current| *current.borrow_mut() = Some(world.clone()));
    let installed = Installed;
    let result = runtime.block_on(main(world.clone()));
    let digest = world.digest();
    // Tasks are dropped while the world is still there: what they do then must find it.
    world.end();
    drop(runtime);
    drop(installed);
    (result, digest)
}

/// A simulated world. Clones are the same world.
#[derive(Clone)]
pub struct World {
    inner: Arc<Inner>,
}

struct Inner {
    seed: u64,
    random: Mutex<u64>,
    digest: Mutex<u64>,
    traced: Mutex<Option<Vec<String>>>,
    machines: Mutex<BTreeMap<NodeId, Arc<Mutex<Machine>>>>,
    net: Mutex<Net>,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("World").field("seed", &self.inner.seed).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    fn new(seed: u64) -> Self {
        Self {
            inner: Arc::new(Inner {
                seed,
                random: Mutex::new(seed ^ 0x5851_f42d_4c95_7f2d),
                digest: Mutex::new(0xcbf2_9ce4_8422_2325),
                traced: Mutex::new(None),
                machines: Mutex::default(),
                net: Mutex::default(),
            }),
        }
    }

    /// What decides everything.
    pub fn seed(&self) -> u64 {
        self.inner.seed
    }

    /// Virtual time since the run began.
    pub fn now(&self) -> Duration {
        SimInstant::try_now().map_or(Duration::ZERO, SimInstant::elapsed_since_start)
    }

    /// Lets virtual time pass.
    pub async fn sleep(&self, duration: Duration) {
        SimRuntime::sleep(duration).await;
    }

    /// Sixty-four bits of chance (splitmix64).
    pub fn random(&self) -> u64 {
        let mut state = lock(&self.inner.random);
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = *state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`; 0 where that is 0.
    pub fn below(&self, bound: u64) -> u64 {
        self.random().checked_rem(bound).unwrap_or(0)
    }

    /// True in so many of a thousand cases.
    pub fn chance(&self, per_mille: u32) -> bool {
        per_mille > 0 && self.below(1_000) < u64::from(per_mille)
    }

    /// A duration between two.
    pub fn between(&self, least: Duration, most: Duration) -> Duration {
        let span = u64::try_from(most.saturating_sub(least).as_nanos()).unwrap_or(u64::MAX);
        least + Duration::from_nanos(self.below(span.saturating_add(1)))
    }

    /// Adds to the digest what happened: same seed, same digest.
    pub fn note(&self, what: &str, bytes: &[u8]) {
        let at = u64::try_from(self.now().as_nanos()).unwrap_or(u64::MAX);
        let mut digest = lock(&self.inner.digest);
        for byte in at.to_le_bytes().iter().chain(what.as_bytes()).chain(bytes) {
            // FNV-1a, 64 bits.
            *digest = (*digest ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
        drop(digest);
        if let Some(lines) = lock(&self.inner.traced).as_mut() {
            lines.push(format!("{:>14} {what} {} bytes", at / 1_000, bytes.len()));
        }
    }

    /// The digest of all that was noted.
    pub fn digest(&self) -> u64 {
        *lock(&self.inner.digest)
    }

    /// Keeps a line for everything that is noted from now on.
    pub fn keep_trace(&self) {
        *lock(&self.inner.traced) = Some(Vec::new());
    }

    /// The lines since [`World::keep_trace`] or the last call.
    pub fn take_trace(&self) -> Vec<String> {
        lock(&self.inner.traced).as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Runs a task that belongs to no node.
    pub fn spawn<F>(&self, future: F) -> Task<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        Task::new(outside(|| SimRuntime::spawn(future)))
    }

    /// A node; it lives from the first time that it is asked for.
    pub fn node(&self, id: NodeId) -> Node {
        let mut machines = lock(&self.inner.machines);
        let machine = machines
            .entry(id)
            .or_insert_with(|| Arc::new(Mutex::new(Machine::new(id, self.inner.seed))))
            .clone();
        Node { id, machine, world: self.clone() }
    }

    /// How messages fare from one node to another from now on.
    pub fn set_link(&self, from: NodeId, to: NodeId, link: Link) {
        self.net().links.insert((from, to), link);
    }

    /// How messages fare from one node to another.
    pub fn link(&self, from: NodeId, to: NodeId) -> Link {
        self.net().links.get(&(from, to)).cloned().unwrap_or_default()
    }

    /// All links are well again.
    pub fn heal_links(&self) {
        self.net().links.clear();
    }

    pub(crate) fn net(&self) -> MutexGuard<'_, Net> {
        lock(&self.inner.net)
    }

    pub(crate) fn unix_ms(&self, node: Option<NodeId>) -> u64 {
        let elapsed = i64::try_from(self.now().as_millis()).unwrap_or(i64::MAX);
        let skew = node.map_or(0, |id| lock(&self.node(id).machine).skew_ms);
        START_UNIX_MS.saturating_add_signed(elapsed.saturating_add(skew))
    }

    /// Nothing of a node runs any more.
    fn end(&self) {
        let machines: Vec<_> = lock(&self.inner.machines).values().cloned().collect();
        for machine in machines {
            let life: Arc<Life> = lock(&machine).life.clone();
            life.end();
        }
    }
}
