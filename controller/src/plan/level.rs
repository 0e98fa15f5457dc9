//! When the cluster's feature level can rise.

use crate::state::cluster::ClusterCommand;
use crate::state::{Command, FEATURE_LEVEL, State};

/// Raises the cluster's feature level to what every host's program supports and this one knows;
/// `None` when it is there already. The leader proposes it.
pub fn raise_feature_level(state: &State) -> Option<Command> {
    let supported = state.cluster.hosts.values().map(|host| host.feature_level).min()?;
    let level = supported.min(FEATURE_LEVEL);
    let next_host_id = state.cluster.next_host_id;
    (level > state.cluster.feature_level)
        .then_some(Command::Cluster(ClusterCommand::RaiseFeatureLevel { level, next_host_id }))
}
