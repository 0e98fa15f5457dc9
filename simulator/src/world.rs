//! What all parts of a run share: the machines, the checkers, the trace and the dice.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use controller::ids::HostId;
use controller::plan::HostView;
use controller::plan::observed::Observed;
use tests::random::Random;

use crate::checks::Checks;
use crate::hardware::Hardware;
use crate::host::NodeHandle;
use crate::runtime;
use crate::trace::Trace;

/// A run. Clones are the same.
#[derive(Clone)]
pub(crate) struct World {
    shared: Arc<Mutex<Shared>>,
}

/// What it holds; never locked across an await.
pub(crate) struct Shared {
    /// The dice for everything that isn't consensus.
    pub(crate) random: Random,
    /// The machines.
    pub(crate) hosts: BTreeMap<HostId, Hardware>,
    /// The nodes' processes that live.
    pub(crate) nodes: BTreeMap<HostId, NodeHandle>,
    /// Directions in which nothing gets through.
    pub(crate) cut: BTreeSet<(HostId, HostId)>,
    /// The checkers.
    pub(crate) checks: Checks,
    /// What happened.
    pub(crate) trace: Trace,
    /// Whether clients go on.
    pub(crate) busy: bool,
    /// Clients that have not ended: what they wait for isn't in the history yet.
    pub(crate) clients: u64,
    /// Nodes that are being started or run.
    pub(crate) starting: BTreeSet<HostId>,
    /// Whether a host is being replaced.
    pub(crate) replacing: bool,
    /// The host whose node's log is damaged now and then.
    pub(crate) damaged: Option<HostId>,
    /// Guests started so far.
    pub(crate) starts: u64,
}

impl World {
    /// A world without machines.
    pub(crate) fn new(seed: u64, print: bool) -> World {
        let shared = Shared {
            random: Random::new(seed ^ 0x7472_696e_6500),
            hosts: BTreeMap::new(),
            nodes: BTreeMap::new(),
            cut: BTreeSet::new(),
            checks: Checks::default(),
            trace: Trace::new(print),
            busy: true,
            clients: 0,
            starting: BTreeSet::new(),
            replacing: false,
            damaged: None,
            starts: 0,
        };
        World { shared: Arc::new(Mutex::new(shared)) }
    }

    /// Looks at or changes what is shared.
    pub(crate) fn with<T>(&self, change: impl FnOnce(&mut Shared) -> T) -> T {
        change(&mut self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes an event.
    pub(crate) fn note(&self, what: impl Display) {
        let now = runtime::now();
        self.with(|shared| shared.trace.add(now, what));
    }

    /// A number from `low` to `high`.
    pub(crate) fn between(&self, low: u64, high: u64) -> u64 {
        self.with(|shared| shared.random.between(low, high))
    }

    /// True in `percent` of 100 throws.
    pub(crate) fn chance(&self, percent: u64) -> bool {
        self.with(|shared| shared.random.chance(percent))
    }

    /// Pauses for a random time.
    pub(crate) async fn pause_ms(&self, low: u64, high: u64) {
        let ms = self.between(low, high);
        runtime::sleep(Duration::from_millis(ms)).await;
    }

    /// A new random id.
    pub(crate) fn id(&self) -> [u8; 16] {
        self.with(|shared| shared.id())
    }

    /// A living node.
    pub(crate) fn node(&self, id: HostId) -> Option<NodeHandle> {
        self.with(|shared| shared.nodes.get(&id).cloned())
    }

    /// Looks at or changes a machine that is there.
    pub(crate) fn host<T>(&self, id: HostId, change: impl FnOnce(&mut Hardware) -> T) -> Option<T> {
        self.with(|shared| shared.hosts.get_mut(&id).map(change))
    }
}

impl Shared {
    /// A new random id.
    pub(crate) fn id(&mut self) -> [u8; 16] {
        (u128::from(self.random.draw()) << 64 | u128::from(self.random.draw())).to_be_bytes()
    }

    /// What a host's agent sees, where storage and switch answer.
    pub(crate) fn observe(&self, id: HostId, view: &HostView) -> Option<Observed> {
        let hardware = self.hosts.get(&id)?;
        let programmed = hardware.switch.program.as_ref() == Some(&view.switch);
        let answers = hardware.storage.up && hardware.switch.up;
        answers.then(|| hardware.observe(programmed))
    }

    /// Whether bytes get from one host to another and back.
    pub(crate) fn connected(&self, a: HostId, b: HostId) -> bool {
        a == b || !(self.cut.contains(&(a, b)) || self.cut.contains(&(b, a)))
    }
}
