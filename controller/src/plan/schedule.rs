//! Placement: which host a server or a volume goes to. Filters and weighers as in Nova,
//! a pure function of the state, the hosts that live and the leader's own placements
//! that aren't in the state yet.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::ids::HostId;

/// Which hosts are heard from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Liveness {
    /// Hosts whose heartbeat is fresh.
    pub up: BTreeSet<HostId>,
}
