//! A simulated host's agent: every decision is the product's (`controller::plan::agent`), the acts
//! are on simulated parts. As in the node, commands only wake it.

mod steps;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use controller::ids::HostId;
use controller::plan::agent::AgentCore;
use controller::plan::observed::Observed;
use controller::plan::{HostView, Step, host_view};
use controller::state::{Command, State, decode_result};

use crate::consensus::Node;
use crate::heartbeat::clock;
use crate::runtime;
use crate::world::World;

/// What the agent looks at anew when nothing wakes it.
const TICK: Duration = Duration::from_secs(1);
/// How often it sees whether something woke it.
const GLANCE: Duration = Duration::from_millis(40);

/// One process's agent. Clones are the same.
#[derive(Clone)]
pub(crate) struct Agent {
    world: World,
    host: HostId,
    raft: Node,
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    core: AgentCore,
    /// Contents that were in the catalog: any other may be an upload that isn't committed.
    images: BTreeSet<String>,
    woken: bool,
}

impl Agent {
    /// An agent in a node's process.
    pub(crate) fn start(world: &World, host: HostId, raft: &Node) {
        let inner = Inner { core: AgentCore::new(host), images: BTreeSet::new(), woken: false };
        let agent = Agent {
            world: world.clone(),
            host,
            raft: raft.clone(),
            inner: Arc::new(Mutex::new(inner)),
        };
        runtime::spawn_on(host, agent.follow());
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn follow(self) {
        let mut looked = None;
        let mut applied = 0;
        loop {
            let contact = self.raft.leader().is_some();
            let read = {
                let core = &mut self.inner().core;
                core.contact(contact);
                core.wants_read()
            };
            if let Some(read) = read {
                let ok = self.raft.read().await.is_ok();
                self.inner().core.read_ended(read, ok);
            }
            let now = runtime::now();
            let due = looked.is_none_or(|looked| now >= looked + TICK);
            let moved = self.raft.applied() != applied;
            let woken = std::mem::take(&mut self.inner().woken);
            if due || moved || woken {
                looked = due.then_some(now).or(looked);
                applied = self.raft.applied();
                self.reconcile(&self.raft.view());
            }
            runtime::sleep(GLANCE).await;
        }
    }

    fn observed(&self, view: &HostView) -> Option<Observed> {
        let mut observed = self.world.with(|shared| shared.observe(self.host, view))?;
        let mut inner = self.inner();
        inner.images.extend(view.images.iter().cloned());
        observed.images.retain(|content| inner.images.contains(content));
        Some(observed)
    }

    fn reconcile(&self, state: &State) {
        let view = Arc::new(host_view(state, self.host));
        let Some(observed) = self.observed(&view) else { return };
        let now = clock(&self.world, self.host);
        let steps = self.inner().core.steps(&view, &observed, now);
        for step in steps {
            runtime::spawn_on(self.host, self.clone().perform(step, Arc::clone(&view)));
        }
    }

    /// How often steps on this subject have failed in a row.
    fn failures(&self, step: &Step) -> u32 {
        self.inner().core.failures(step)
    }

    async fn perform(self, step: Step, view: Arc<HostView>) {
        let result = self.execute(&step, &view).await;
        let outcome = match &result {
            Ok(()) => "done".to_owned(),
            Err(why) => format!("failed: {why}"),
        };
        self.world.note(format_args!("host {} {step:?} {outcome}", self.host));
        let now = clock(&self.world, self.host);
        let mut inner = self.inner();
        inner.core.done(&step, result, now);
        inner.woken = true;
    }

    /// Reports an observed fact.
    async fn report(&self, command: Command) -> Result<(), String> {
        let id = self.world.id();
        let proposed = self.raft.propose(id, command.encode()).await;
        let proposed = proposed.map_err(|error| error.to_string())?;
        match decode_result(&proposed.outcome).map_err(|error| error.to_string())? {
            Ok(_) => Ok(()),
            Err(rejection) => Err(format!("the report was refused: {rejection}")),
        }
    }
}
