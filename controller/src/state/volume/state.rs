//! Volumes and their attachments.

use std::collections::BTreeMap;
use std::sync::Arc;

use imbl::{OrdMap, OrdSet};
use serde::{Deserialize, Serialize};

use crate::ids::{AttachmentId, HostId, ProjectId, ServerId, UserId, VolumeId};

/// Volumes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Volumes {
    /// Volumes.
    pub volumes: OrdMap<VolumeId, Arc<Volume>>,
    /// What each host is home to; follows from `volumes`.
    pub homed: OrdMap<HostId, Homed>,
    /// The volumes attached to each server; follows from `volumes`.
    pub by_server: OrdMap<ServerId, OrdSet<VolumeId>>,
}

/// What a host is home to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Homed {
    /// Which volumes.
    pub volumes: OrdSet<VolumeId>,
    /// Their size together.
    pub size_gib: u64,
}

/// Cinder's `status`.
///
/// ```text
/// creating ──► available ──► attaching ──► in-use ◄──► detaching ──► available
///    │             │
///    └──► error    └──► deleting ──► gone
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VolumeStatus {
    /// Its home is making it.
    Creating,
    /// It can be attached.
    Available,
    /// Promised to a server.
    Reserved,
    /// Being attached.
    Attaching,
    /// Attached.
    InUse,
    /// Being detached.
    Detaching,
    /// Going away.
    Deleting,
    /// Failed.
    Error,
}

impl VolumeStatus {
    /// Cinder's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Available => "available",
            Self::Reserved => "reserved",
            Self::Attaching => "attaching",
            Self::InUse => "in-use",
            Self::Detaching => "detaching",
            Self::Deleting => "deleting",
            Self::Error => "error",
        }
    }
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Its id.
    pub id: VolumeId,
    /// Its name.
    pub name: String,
    /// Free text.
    pub description: Option<String>,
    /// Its project.
    pub project_id: ProjectId,
    /// Who made it.
    pub user_id: UserId,
    /// Its size.
    pub size_gib: u64,
    /// Metadata.
    pub metadata: BTreeMap<String, String>,
    /// The availability zone.
    pub availability_zone: String,
    /// Marked as bootable.
    pub bootable: bool,
    /// Cinder's status.
    pub status: VolumeStatus,
    /// Why it is in error, or why it is still attached.
    pub fault: Option<String>,
    /// The host whose storage process is its only gate.
    pub home: Option<HostId>,
    /// Grows with each attachment: the one writer is who has the newest.
    pub generation: u64,
    /// The attachment, if any (one writer).
    pub attachments: Vec<Attachment>,
    /// When it was made.
    pub created_ms: u64,
    /// When it last changed.
    pub updated_ms: u64,
}

/// How long a guest is asked to let go of a volume, by the leader's time: then the volume stays
/// attached, as in Nova after its tries, and can be detached later.
pub const DETACH_MS_MAX: u64 = 60_000;

/// Where an attachment is in its life.
///
/// ```text
/// attaching ──► attached ──► detaching ──► (gone)
///     │            ▲             │
///     └─► (gone)   └─ too long ──┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttachmentState {
    /// The server's host is plugging it in.
    Attaching,
    /// The guest has it.
    Attached,
    /// The server's host is unplugging it.
    Detaching,
}

/// A volume's attachment to a server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// Its id.
    pub id: AttachmentId,
    /// The server.
    pub server_id: ServerId,
    /// The device's name, `/dev/vdb` …
    pub device: String,
    /// The server's host.
    pub host: Option<HostId>,
    /// The volume's generation for this attachment.
    pub generation: u64,
    /// Where it is in its life.
    pub state: AttachmentState,
    /// The volume goes when the server goes.
    pub delete_on_termination: bool,
    /// The device tag.
    pub tag: Option<String>,
    /// When it was asked for.
    pub attached_ms: u64,
    /// Since when the guest has been asked to let go of it. After [`DETACH_MS_MAX`] it stays
    /// attached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detaching_ms: Option<u64>,
}
