//! How a host follows the replicated state.
//!
//! Commands only wake the agent, they are never its input. On each wake-up (a command was applied,
//! a guest ended, a step was done, a second has passed) it takes its host's share of the state
//! ([`controller::plan::host_view`]), compares it with what it observes ([`world`]) and performs
//! the steps that [`controller::plan::plan`] names ([`execute`]). Start, restart and recovery are
//! the same path.
//!
//! What may be done when (the ReadIndex gate, one step at a time for each subject, pauses after
//! failures) is [`controller::plan::agent::AgentCore`]; here its steps are performed.

mod directory;
mod execute;
mod launch;
mod ports;
mod program;
mod volumes;
mod world;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use abi::lease::{self, LeasePage};
use anyhow::{Context as _, Result, anyhow};
use controller::api::SubState;
use controller::ids::{HostId, ServerId};
use controller::plan::agent::{AgentCore, Read, Reconcilers};
use controller::plan::{HostView, Step, host_view};
use controller::seal::Sealer;
use controller::state::{Command, Outcome, State, decode_result};
use serde::Serialize;
use tokio::sync::Notify;
use tracing::{debug, info, warn};

use crate::daemon::Machine;
use directory::{GuestDirectory, Life};
use world::World;

/// What the agent looks at anew when nothing wakes it.
const TICK: Duration = Duration::from_secs(1);
/// How long something that a user waits for is tried before the user is told that it failed:
/// longer than a restart of storage or switch takes.
const GIVE_UP_AFTER: Duration = Duration::from_secs(15);
/// Most bytes of a console log that one request gets.
pub(crate) const CONSOLE_BYTES_MAX: usize = 1 << 20;

/// What an agent works with.
pub(crate) struct Context {
    /// Its host.
    pub(crate) host: HostId,
    /// The guests' directories.
    pub(crate) guests: PathBuf,
    /// The replicated state.
    pub(crate) raft: raft::Raft<Machine>,
    /// The storage process's control socket.
    pub(crate) storage: PathBuf,
    /// The switch's control socket.
    pub(crate) switch: PathBuf,
    /// Makes guests' processes.
    pub(crate) spawner: crate::spawner::Spawner,
    /// Opens sealed user data.
    pub(crate) sealer: Sealer,
    /// Until when guests may change their disks.
    pub(crate) lease: Arc<LeasePage>,
}

/// A guest, for `trine status`.
#[derive(Clone, Debug, Serialize, serde::Deserialize)]
pub(crate) struct GuestStatus {
    /// The server's id.
    pub(crate) id: String,
    /// `running`, `ended`, `absent`.
    pub(crate) state: String,
    /// The VMM's process id.
    pub(crate) pid: Option<u32>,
    /// The generation it was started with.
    pub(crate) generation: u64,
    /// Volumes plugged into it.
    pub(crate) volumes: Vec<String>,
    /// What its start took, stage by stage; empty where an earlier node started it.
    #[serde(default)]
    pub(crate) stages: Vec<StageTime>,
}

/// A stage of a guest's start.
#[derive(Clone, Debug, Serialize, serde::Deserialize)]
pub(crate) struct StageTime {
    /// `networking`, `block_device_mapping` (beside it), `spawning`.
    pub(crate) stage: String,
    /// How long it took.
    pub(crate) ms: f64,
}

/// One host's agent. Clones are the same agent.
#[derive(Clone)]
pub(crate) struct Agent {
    inner: Arc<Inner>,
}

struct Inner {
    context: Context,
    core: Mutex<AgentCore>,
    world: Mutex<World>,
    wake: Notify,
    /// Held while the switch gets a program.
    programming: Mutex<()>,
}

impl Agent {
    /// Finds the guests that run on this host and starts to follow the state.
    pub(crate) fn start(context: Context) -> Result<Agent> {
        std::fs::create_dir_all(&context.guests)
            .with_context(|| format!("cannot make {}", context.guests.display()))?;
        let world = World::find(&context.guests)?;
        info!(guests = world.guests.len(), "agent: guests found");
        let inner = Inner {
            core: Mutex::new(AgentCore::new(context.host)),
            context,
            world: Mutex::new(world),
            wake: Notify::new(),
            programming: Mutex::new(()),
        };
        let agent = Agent { inner: Arc::new(inner) };
        agent.watch_found_guests();
        tokio::spawn(agent.clone().follow());
        Ok(agent)
    }

    /// The guests on this host.
    pub(crate) fn guests(&self) -> Vec<GuestStatus> {
        self.with_world(|world| world.guest_statuses())
    }

    /// Servers whose guest runs on this host or is being started.
    pub(crate) fn live_guests(&self) -> Vec<ServerId> {
        self.with_world(|world| world.live_guests())
    }

    /// What each reconciler did last.
    pub(crate) fn reconcilers(&self) -> Reconcilers {
        self.with_core(|core| core.reconcilers(lease::now()))
    }

    /// The last bytes of a guest's console, at most `limit`.
    pub(crate) fn console(&self, server: &ServerId, limit: usize) -> Result<Vec<u8>> {
        let directory = GuestDirectory::of(&self.inner.context.guests, server.as_str());
        directory.console(limit.min(CONSOLE_BYTES_MAX)).context("cannot read the console log")
    }

    /// How tightly guests are closed on this host, in words.
    pub(crate) fn sandbox(&self) -> String {
        self.context().spawner.sandbox()
    }

    /// How far the start of a guest has come, while it is being started here.
    pub(crate) fn sub_state(&self, server: &ServerId) -> Option<SubState> {
        self.with_world(|world| world.starting.get(server).copied())
    }

    /// Lets the agent look at everything anew: storage or switch were started again.
    pub(crate) fn wake(&self) {
        self.inner.wake.notify_one();
    }

    fn context(&self) -> &Context {
        &self.inner.context
    }

    fn with_world<T>(&self, look: impl FnOnce(&mut World) -> T) -> T {
        look(&mut self.inner.world.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Looks at a guest anew; blocks for as long as its VMM takes to answer.
    fn refresh_guest(&self, id: &ServerId) {
        if let Some(look) = self.with_world(|world| world.look_at(id)) {
            let seen = look.take();
            self.with_world(|world| world.saw(seen));
        }
    }

    fn with_core<T>(&self, decide: impl FnOnce(&mut AgentCore) -> T) -> T {
        decide(&mut self.inner.core.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How often steps of this kind on this subject have failed in a row.
    fn failures(&self, step: &Step) -> u32 {
        self.with_core(|core| core.failures(step))
    }

    /// For how long they have.
    fn failing_for(&self, step: &Step) -> Duration {
        self.with_core(|core| core.failing_for(step, lease::now()))
    }

    fn watch_found_guests(&self) {
        let found = self.with_world(|world| world.running_pidfds());
        for (server, pidfd) in found {
            self.watch(server, pidfd);
        }
    }

    /// Wakes the agent when a guest's process ends.
    fn watch(&self, server: ServerId, pidfd: std::os::fd::OwnedFd) {
        let agent = self.clone();
        tokio::spawn(async move {
            if let Err(error) = crate::process_end::process_end(pidfd).await {
                warn!(server_id = %server, %error, "agent: cannot watch a guest's process");
            }
            agent.refresh_guest(&server);
            agent.wake();
        });
    }

    async fn follow(self) {
        let mut applied = self.context().raft.applied();
        let mut looked = None::<Instant>;
        loop {
            let leader_known = self.context().raft.status().leader.is_some();
            self.with_core(|core| core.contact(leader_known));
            if let Some(read) = self.with_core(AgentCore::wants_read) {
                tokio::spawn(self.clone().read(read));
            }
            if self.with_core(|core| core.is_open()) {
                if looked.is_none_or(|looked| looked.elapsed() >= TICK) {
                    self.look().await;
                    looked = Some(Instant::now());
                }
                let _ = applied.borrow_and_update();
                self.reconcile(&self.context().raft.view());
            }
            let retry = self.with_core(|core| core.next_retry(lease::now()));
            let pause = retry.unwrap_or(TICK).min(TICK);
            tokio::select! {
                changed = applied.changed() => if changed.is_err() { return },
                () = self.inner.wake.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// The read that opens the gate. Contact may be lost and found again meanwhile.
    async fn read(self, read: Read) {
        let ok = self.context().raft.read().await.is_ok();
        self.with_core(|core| core.read_ended(read, ok));
        self.wake();
    }

    /// Asks storage and switch what they hold.
    async fn look(&self) {
        let agent = self.clone();
        let looked = tokio::task::spawn_blocking(move || {
            let context = agent.context();
            let storage =
                storage::Client::connect(&context.storage).and_then(|mut client| client.status());
            let switch = netstack::client::Client::connect(&context.switch)
                .and_then(|mut client| client.status());
            agent.with_world(|world| {
                match storage {
                    Ok(status) => world.saw_storage(&status),
                    Err(error) => debug!(%error, "agent: storage does not answer"),
                }
                match switch {
                    Ok(status) => world.saw_switch(&status),
                    Err(error) => debug!(%error, "agent: the switch does not answer"),
                }
            });
            agent.with_world(World::remove_strays);
            for look in agent.with_world(|world| world.looks_due()) {
                let seen = look.take();
                agent.with_world(|world| world.saw(seen));
            }
        });
        if let Err(error) = looked.await {
            warn!(%error, "agent: looking around failed");
        }
    }

    fn reconcile(&self, state: &State) {
        let view = Arc::new(host_view(state, self.context().host));
        let Some(observed) = self.with_world(|world| world.observed(&view)) else { return };
        for step in self.with_core(|core| core.steps(&view, &observed, lease::now())) {
            tokio::spawn(self.clone().perform(step, Arc::clone(&view)));
        }
    }

    async fn perform(self, step: Step, view: Arc<HostView>) {
        let start = Instant::now();
        let result = self.execute(&step, &view).await;
        let ms = start.elapsed().as_secs_f64() * 1e3;
        match &result {
            Ok(()) => debug!(?step, ms, "agent: step done"),
            Err(error) => warn!(?step, ms, error = %format!("{error:#}"), "agent: step failed"),
        }
        let result = result.map_err(|error| format!("{error:#}"));
        self.with_core(|core| core.done(&step, result, lease::now()));
        self.wake();
    }

    /// Reports an observed fact.
    async fn report(&self, command: Command) -> Result<()> {
        let id = *uuid::Uuid::new_v4().as_bytes();
        let proposed = self.context().raft.propose(id, command.encode()).await?;
        match decode_result(&proposed.outcome).map_err(|error| anyhow!("{error}"))? {
            Ok(Outcome::Ignored) => debug!("agent: a report about the past was ignored"),
            Ok(_) => {}
            Err(rejection) => return Err(anyhow!("the report was refused: {rejection:?}")),
        }
        Ok(())
    }

    /// Runs blocking work on a thread of its own.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Agent) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let agent = self.clone();
        tokio::task::spawn_blocking(move || work(&agent)).await?
    }

    fn storage(&self) -> Result<storage::Client> {
        Ok(storage::Client::connect(&self.context().storage)?)
    }

    fn switch(&self) -> Result<netstack::client::Client> {
        Ok(netstack::client::Client::connect(&self.context().switch)?)
    }
}

/// Ends every guest below `guests`, with or without a node that runs; they start again with the
/// next node unless they are deleted meanwhile.
pub(crate) fn stop_guests(guests: &Path) -> Result<usize> {
    let mut stopped = 0;
    for directory in GuestDirectory::all(guests)? {
        let Some(mut record) = directory.record() else { continue };
        match directory.life(&record)? {
            Life::Running(_, process) => {
                record.stopped = true;
                directory.write(&record)?;
                anyhow::ensure!(process.kill(), "guest {} does not end", record.server_id);
                stopped += 1;
            }
            Life::Silent(why) => anyhow::bail!(
                "guest {} lives, and its VMM does not say which process it is: {why}",
                record.server_id
            ),
            Life::Ended(_) | Life::Reset | Life::Absent => {}
        }
    }
    Ok(stopped)
}
