//! When the cluster's feature level can rise.

use crate::state::{FEATURE_LEVEL, State};

/// The level that every host's program supports, when it is above the cluster's and this program
/// knows it. The leader proposes it.
pub fn feature_level_to_raise(state: &State) -> Option<u32> {
    let supported = state.cluster.hosts.values().map(|host| host.feature_level).min()?;
    let level = supported.min(FEATURE_LEVEL);
    (level > state.cluster.feature_level).then_some(level)
}
