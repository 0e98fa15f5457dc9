//! What an agent sees on its host, in the controller's words.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{PortId, ServerId, VolumeId};

/// Everything that matters for the plan, as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Guests with a directory on this host.
    pub guests: BTreeMap<ServerId, Guest>,
    /// Servers with disks of their own in this host's storage.
    pub roots: BTreeSet<ServerId>,
    /// Volumes in this host's storage.
    pub volumes: BTreeMap<VolumeId, Volume>,
    /// Contents of images that storage holds.
    pub images: BTreeSet<String>,
    /// The switch.
    pub switch: Switch,
}

/// A guest on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guest {
    /// The generation it was started with.
    pub generation: u64,
    /// How it is.
    pub state: GuestState,
    /// Volumes plugged into it.
    pub volumes: BTreeSet<VolumeId>,
    /// Those among them whose connection to their home is lost: the guest waits for another.
    pub disconnected: BTreeSet<VolumeId>,
}

/// How a guest is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestState {
    /// Its process lives.
    Running,
    /// It ended by itself, or its process died: why.
    Ended(String),
    /// It asked for a reset, as a PC's reboot does, and its process ended. `rested`: it may start
    /// again; one that does nothing but reset itself is slowed down.
    Reset {
        /// Whether it ran, or waited, for long enough.
        rested: bool,
    },
    /// It was not started, or ended with the host or by the operator's stop of the node; its
    /// disks may be there.
    Absent,
}

/// A volume in this host's storage.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Volume {
    /// Who may write to it by the gate's own record.
    pub holder: Option<(ServerId, u64)>,
    /// The host that its export is for, by the name in its certificate.
    pub host: Option<String>,
}

/// The switch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Switch {
    /// Whether the program in force is the wanted one.
    pub programmed: bool,
    /// Attached ports and the generation they were attached with.
    pub attached: BTreeMap<PortId, u64>,
}
