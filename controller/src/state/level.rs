//! Feature levels: what the cluster as a whole understands.
//!
//! A program supports every level up to its own. The cluster's level is part of the state and
//! rises by command, once every host's program supports it: until then a command of a later level
//! is refused, and what an earlier level did is done as it was then.
//!
//! | level | since then |
//! |---|---|
//! | 1 | the first |
//! | 2 | fences, evacuation, removal of hosts; servers on a host that is out are deleted at once; key rotation; expiry of uploads |

use super::Command;
use super::cluster::{Cluster, ClusterCommand};
use super::compute::ComputeCommand;
use super::image::ImageCommand;
use super::outcome::Rejection;
use super::volume::VolumeCommand;

/// The greatest level that this program supports; a new cluster starts with it.
pub const FEATURE_LEVEL: u32 = 2;

impl Command {
    /// The first level that has this command.
    pub fn feature_level(&self) -> u32 {
        match self {
            Self::Cluster(
                ClusterCommand::FenceHost { .. }
                | ClusterCommand::HostReturned { .. }
                | ClusterCommand::RemoveHost { .. }
                | ClusterCommand::SetHostService { evacuate: Some(_), .. }
                | ClusterCommand::RotateKey { .. }
                | ClusterCommand::RetireKey { .. }
                | ClusterCommand::RotateTokenKeys { .. }
                | ClusterCommand::ResealTokenKeys { .. },
            )
            | Self::Compute(
                ComputeCommand::EvacuateServer { .. }
                | ComputeCommand::ServerWaits { .. }
                | ComputeCommand::ResealServer { .. },
            )
            | Self::Volume(VolumeCommand::DetachExpired { .. })
            | Self::Image(ImageCommand::UploadBegun { .. } | ImageCommand::UploadEnded { .. }) => 2,
            _ => 1,
        }
    }
}

impl Cluster {
    /// True from `level` on.
    pub fn has(&self, level: u32) -> bool {
        self.feature_level >= level
    }

    /// Refuses a command that a host of this cluster may not know yet. To be asked before it is
    /// proposed: an older program can't even read it.
    ///
    /// # Errors
    /// When the command is of a later level.
    pub fn admits(&self, command: &Command) -> Result<(), Rejection> {
        let needed = command.feature_level();
        if self.has(needed) {
            return Ok(());
        }
        let message = format!(
            "This needs feature level {needed} and the cluster is at {}: upgrade trine on every host; the level rises by itself then.",
            self.feature_level
        );
        Err(Rejection::state("cluster", &self.id, message))
    }
}
