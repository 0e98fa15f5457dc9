//! Clients: each asks random things of random nodes, tries again under the same id where it got
//! no answer, and keeps a record of what it was told.

use std::time::Duration;

use controller::ids::{HostId, ServerId, VolumeId};
use controller::state::identity::IdentityCommand;
use controller::state::volume::VolumeCommand;
use controller::state::{
    Command, Outcome, Rejection, RejectionKind, State, compute::ComputeCommand, decode_result,
};
use tests::linearizability::{RegisterAnswer, RegisterCall, SlotAnswer, SlotCall};

use crate::checks::Span;
use crate::host::NodeHandle;
use crate::runtime;
use crate::setup::{REGISTERS, USER};
use crate::workload;
use crate::world::World;

/// Tries of one command.
const TRIES: usize = 4;
/// Placements of one command.
const PLACEMENTS: usize = 4;
/// Names of keypairs, each a slot.
const SLOTS: [&str; 3] = ["key-a", "key-b", "key-c"];

/// What a client was told of a command: nothing, or what it came to.
type Told = Option<Result<Outcome, Rejection>>;

/// One client.
pub(crate) struct Client {
    world: World,
    number: usize,
    written: u64,
}

impl Client {
    /// The client of a number.
    pub(crate) fn new(world: &World, number: usize) -> Client {
        Client { world: world.clone(), number, written: 0 }
    }

    /// Goes on until the world is no longer busy.
    pub(crate) async fn run(mut self) {
        while self.world.with(|shared| shared.busy) {
            self.world.pause_ms(20, 500).await;
            match self.world.between(0, 99) {
                0..=17 => self.write_register().await,
                18..=33 => self.read_register().await,
                34..=53 => self.slot().await,
                _ => self.change().await,
            }
        }
    }

    /// A node to ask; it may have just died.
    fn node(&self) -> Option<NodeHandle> {
        self.world.with(|shared| {
            let all: Vec<HostId> = shared.nodes.keys().copied().collect();
            if all.is_empty() {
                return None;
            }
            let id = *shared.random.pick(&all);
            shared.nodes.get(&id).cloned()
        })
    }

    /// Proposes until there is an answer, under one id; a placement that is stale is made anew.
    async fn propose(&self, command: &Command) -> Told {
        for _ in 0..PLACEMENTS {
            let told = self.propose_as(self.world.id(), command).await;
            match told {
                Some(Err(why)) if why.kind == RejectionKind::PlacementStale => {}
                told => return told,
            }
        }
        None
    }

    async fn propose_as(&self, id: [u8; 16], command: &Command) -> Told {
        for _ in 0..TRIES {
            if let Some(node) = self.node()
                && let Some(proposed) = node.raft.propose_for(id, command.encode()).await
            {
                let result = decode_result(&proposed.outcome);
                self.world.with(|shared| match &result {
                    Ok(Err(why)) if why.kind == RejectionKind::PlacementStale => {}
                    Ok(_) => shared.checks.acknowledged.command(proposed.index, id),
                    Err(error) => shared.checks.find("acknowledged", error),
                });
                return result.ok();
            }
            self.world.pause_ms(50, 400).await;
        }
        None
    }

    fn span(called: Duration) -> Span {
        let nanos = |at: Duration| u64::try_from(at.as_nanos()).unwrap_or(u64::MAX);
        Span { called: nanos(called), answered: nanos(runtime::now()) }
    }

    async fn read(&self) -> Option<State> {
        self.node()?.raft.read_for().await
    }

    async fn write_register(&mut self) {
        let key = self.pick(&REGISTERS);
        self.written += 1;
        let value = format!("{}-{}", self.number, self.written);
        let command = Command::Identity(IdentityCommand::UpdateProject {
            id: key.into(),
            name: None,
            description: Some(value.clone()),
            enabled: None,
            tags: None,
        });
        let called = runtime::now();
        let told = self.propose(&command).await;
        let answer = told.and_then(|told| told.ok()).map(|_| RegisterAnswer::Written);
        self.note(format_args!("writes {value} to {key}: {answer:?}"));
        let call = RegisterCall::Write(value);
        self.world.with(|shared| {
            shared.checks.reads.register(key, self.number, call, Self::span(called), answer);
        });
    }

    async fn read_register(&self) {
        let key = self.pick(&REGISTERS);
        let called = runtime::now();
        let Some(state) = self.read().await else { return };
        let project = state.identity.projects.get(key);
        let holds = project.map_or_else(String::new, |project| project.description.clone());
        self.note(format_args!("reads {holds} of {key}"));
        let answer = Some(RegisterAnswer::Holds(holds));
        let (call, span) = (RegisterCall::Read, Self::span(called));
        self.world.with(|shared| {
            shared.checks.reads.register(key, self.number, call, span, answer);
        });
    }

    async fn slot(&self) {
        let key = self.pick(&SLOTS);
        let called = runtime::now();
        let (call, answer) = match self.world.between(0, 2) {
            0 => (SlotCall::Take, self.take_slot(key).await),
            1 => (SlotCall::Free, self.free_slot(key).await),
            _ => {
                let Some(state) = self.read().await else { return };
                let there = state.compute.keypairs.contains_key(&(USER.into(), key.to_owned()));
                let answer = if there { SlotAnswer::There } else { SlotAnswer::Missing };
                (SlotCall::Look, Some(answer))
            }
        };
        self.note(format_args!("{call:?} {key}: {answer:?}"));
        self.world.with(|shared| {
            shared.checks.reads.slot(key, self.number, call, Self::span(called), answer);
        });
    }

    async fn take_slot(&self, key: &str) -> Option<SlotAnswer> {
        let command = Command::Compute(ComputeCommand::CreateKeypair {
            name: key.to_owned(),
            user_id: USER.into(),
            kind: "ssh".into(),
            public_key: "ssh-ed25519 AAAA".into(),
            fingerprint: "00:11".into(),
        });
        Some(match self.propose(&command).await? {
            Ok(_) => SlotAnswer::Done,
            Err(_) => SlotAnswer::There,
        })
    }

    async fn free_slot(&self, key: &str) -> Option<SlotAnswer> {
        let (user_id, name) = (USER.into(), key.to_owned());
        let command = Command::Compute(ComputeCommand::DeleteKeypair { user_id, name });
        Some(match self.propose(&command).await? {
            Ok(_) => SlotAnswer::Done,
            Err(_) => SlotAnswer::Missing,
        })
    }

    /// A change of servers, volumes or ports, chosen by what some node shows.
    async fn change(&self) {
        let Some(node) = self.node() else { return };
        let state = node.raft.view();
        let command = self.world.with(|shared| workload::next(&mut shared.random, &state));
        let Some(command) = command else { return };
        self.before(&command);
        let told = self.propose(&command).await;
        let words = match &told {
            None => "no answer".to_owned(),
            Some(Ok(_)) => "done".to_owned(),
            Some(Err(why)) => format!("refused: {why}"),
        };
        self.note(format_args!("{}: {words}", workload::words(&command)));
        if let Some(Ok(_)) = told {
            self.after(&command);
        }
    }

    /// What is asked for may happen from now on.
    fn before(&self, command: &Command) {
        self.world.with(|shared| {
            let told = &mut shared.checks.acknowledged;
            match command {
                Command::Compute(ComputeCommand::DeleteServer(id)) => {
                    told.server_deletion_asked(id)
                }
                Command::Volume(VolumeCommand::Delete(id)) => told.volume_deletion_asked(id),
                Command::Volume(VolumeCommand::Attach {
                    volume_id,
                    delete_on_termination: true,
                    ..
                }) => told.volume_deletion_asked(volume_id),
                _ => {}
            }
        });
    }

    /// What was acknowledged has to be kept.
    fn after(&self, command: &Command) {
        self.world.with(|shared| {
            let told = &mut shared.checks.acknowledged;
            match command {
                Command::Compute(ComputeCommand::CreateServer(new)) => {
                    told.server_made(&ServerId::clone(&new.id));
                }
                Command::Compute(ComputeCommand::DeleteServer(id)) => told.server_deleted(id),
                Command::Volume(VolumeCommand::Create(new)) => {
                    told.volume_made(&VolumeId::clone(&new.id));
                }
                _ => {}
            }
        });
    }

    fn pick(&self, of: &[&'static str]) -> &'static str {
        self.world.with(|shared| *shared.random.pick(of))
    }

    fn note(&self, what: std::fmt::Arguments<'_>) {
        self.world.note(format_args!("client {} {what}", self.number));
    }
}
