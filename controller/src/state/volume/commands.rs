//! Commands on volumes. An update's `None` leaves the field as it is.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ids::{AttachmentId, ProjectId, ServerId, UserId, VolumeId};
use crate::state::compute::Placement;

/// A command on volumes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum VolumeCommand {
    /// Makes a volume.
    Create(Box<NewVolume>),
    /// Changes what is said of a volume.
    Update {
        /// Which.
        id: VolumeId,
        /// New name.
        name: Option<String>,
        /// New description.
        description: Option<Option<String>>,
        /// New metadata, replacing all.
        metadata: Option<BTreeMap<String, String>>,
        /// Mark as bootable or not.
        bootable: Option<bool>,
    },
    /// The user wants it gone.
    Delete(VolumeId),
    /// The user wants it attached. Refused while another attachment exists.
    Attach {
        /// The volume.
        volume_id: VolumeId,
        /// The server.
        server_id: ServerId,
        /// The attachment's id.
        attachment_id: AttachmentId,
        /// The device's name, or the next free one.
        device: Option<String>,
        /// The device tag.
        tag: Option<String>,
        /// The volume goes when the server goes.
        delete_on_termination: bool,
    },
    /// The user wants it detached.
    Detach {
        /// The volume.
        volume_id: VolumeId,
        /// The server.
        server_id: ServerId,
    },
    /// Observed: its home made it.
    Created(VolumeId),
    /// Observed: its home can't make it.
    Failed {
        /// Which.
        id: VolumeId,
        /// Why.
        reason: String,
    },
    /// Observed: its home removed it.
    Gone(VolumeId),
    /// Observed: the guest has it.
    Attached {
        /// The volume.
        volume_id: VolumeId,
        /// The attachment's generation.
        generation: u64,
    },
    /// Observed: the attachment can't be made; the volume is free again.
    AttachFailed {
        /// The volume.
        volume_id: VolumeId,
        /// The attachment's generation.
        generation: u64,
        /// Why.
        reason: String,
    },
    /// The guest did not let go of it in time: it stays attached. Refused before the time is over,
    /// by the time that the leader stamped.
    DetachExpired {
        /// The volume.
        volume_id: VolumeId,
        /// The attachment's generation.
        generation: u64,
        /// When the detachment began that is over.
        asked_ms: u64,
    },
    /// Observed: the guest no longer has it and nothing can write through it.
    Detached {
        /// The volume.
        volume_id: VolumeId,
        /// The attachment's generation.
        generation: u64,
    },
}

/// A volume to make.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NewVolume {
    /// Its id.
    pub id: VolumeId,
    /// Its name.
    pub name: String,
    /// Free text.
    pub description: Option<String>,
    /// Its project.
    pub project_id: ProjectId,
    /// Who makes it.
    pub user_id: UserId,
    /// Its size.
    pub size_gib: u64,
    /// Metadata.
    pub metadata: BTreeMap<String, String>,
    /// The availability zone asked for.
    pub availability_zone: Option<String>,
    /// Where it goes; filled in by the leader (`plan::prepare`).
    pub placement: Option<Placement>,
}
