//! A guest's directory and its process.

use std::collections::{BTreeMap, BTreeSet};

use controller::ids::{HostId, PortId, VolumeId};
use controller::plan::observed::{self, GuestState};

/// A guest's directory.
#[derive(Clone, Debug)]
pub(crate) struct Guest {
    /// The generation it was started with.
    pub(crate) generation: u64,
    /// Names this start among all of this server.
    pub(crate) nonce: u64,
    /// Its ports.
    pub(crate) ports: Vec<PortId>,
    /// The agent ended it.
    pub(crate) stopped: bool,
    /// Its process, while it lives.
    pub(crate) process: Option<Process>,
    /// Its exit record.
    pub(crate) ended: Option<String>,
}

/// A VMM.
#[derive(Clone, Debug, Default)]
pub(crate) struct Process {
    /// Volumes that are plugged in, and how they are reached.
    pub(crate) disks: BTreeMap<VolumeId, Disk>,
}

/// How a guest reaches a volume, and the generation it was attached with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Disk {
    /// By a raw descriptor, past the gate.
    Local {
        /// Of the attachment.
        generation: u64,
    },
    /// By a connection to its home.
    Remote {
        /// Of the attachment.
        generation: u64,
        /// Where the volume is.
        home: HostId,
        /// The connection.
        session: u64,
        /// The storage process of the guest's host that carries it.
        instance: u64,
    },
}

impl Disk {
    /// The attachment's generation.
    pub(crate) fn generation(&self) -> u64 {
        match self {
            Disk::Local { generation } | Disk::Remote { generation, .. } => *generation,
        }
    }
}

impl Guest {
    /// A guest that was just started.
    pub(crate) fn started(generation: u64, nonce: u64, ports: Vec<PortId>) -> Guest {
        Guest {
            generation,
            nonce,
            ports,
            stopped: false,
            process: Some(Process::default()),
            ended: None,
        }
    }

    /// Its process ends.
    pub(crate) fn end(&mut self, why: &str) {
        if self.process.take().is_some() {
            self.ended = Some(why.to_owned());
        }
    }

    /// The host's power was cut.
    pub(crate) fn lost_with_host(&mut self) {
        if self.process.take().is_some() {
            self.ended = None;
        }
    }

    /// What the agent sees, while its storage is this process.
    pub(crate) fn observed(&self, instance: u64) -> observed::Guest {
        let state = match (&self.process, &self.ended) {
            (Some(_), _) => GuestState::Running,
            (None, Some(why)) if !self.stopped => GuestState::Ended(why.clone()),
            (None, _) => GuestState::Absent,
        };
        let disks = self.process.iter().flat_map(|process| process.disks.keys().cloned());
        observed::Guest {
            generation: self.generation,
            state,
            volumes: disks.collect(),
            disconnected: self.disconnected(instance),
        }
    }

    /// Volumes whose connection ended with the storage process that carried it.
    fn disconnected(&self, now: u64) -> BTreeSet<VolumeId> {
        let disks = self.process.iter().flat_map(|process| &process.disks);
        let lost = disks
            .filter(|(_, disk)| matches!(disk, Disk::Remote { instance, .. } if *instance != now));
        lost.map(|(id, _)| id.clone()).collect()
    }
}
