//! Opening a node's directory: log and snapshots together, because each says what the other must
//! hold.

use std::path::PathBuf;

use crate::{
    StartError,
    disk::Disk,
    snapshot::SnapshotFiles,
    types::{Membership, Snapshot},
    wal::{Identity, Opened, Opening, WalError, WalOptions},
};

/// Where snapshots lie within a node's directory.
pub(crate) const SNAPSHOTS: &str = "snapshots";

/// A node's files, opened.
pub(crate) struct Files<D: Disk> {
    pub(crate) log: Opened<D>,
    pub(crate) snapshots: SnapshotFiles<D>,
    /// What the state begins with.
    pub(crate) newest: Option<Snapshot>,
}

/// Opens what is on disk and repairs what can be repaired. A node whose log is damaged opens with
/// what is left and says so in `healing`; one that nobody could heal is refused.
pub(crate) fn open<D: Disk>(
    disk: D,
    identity: Identity,
    directory: PathBuf,
    fresh_incarnation: [u8; 16],
) -> Result<Files<D>, StartError> {
    let opening = Opening::begin(
        disk.clone(),
        WalOptions {
            directory: directory.clone(),
            identity,
            segment_bytes: D::SEGMENT_BYTES,
            fresh_incarnation,
        },
    )?;
    let files = SnapshotFiles::open(disk, directory.join(SNAPSHOTS), identity)?;
    let snapshot = files.newest()?;
    if let Some(damage) = &opening.scan().damage {
        let logged = opening.scan().newest_membership();
        let snapshotted =
            snapshot.as_ref().map(|snapshot| snapshot.meta.last_membership.membership());
        if logged.as_ref().or(snapshotted).is_some_and(|members| is_alone(members, identity)) {
            let mut damage = damage.clone();
            damage
                .reason
                .push_str("; this node is its cluster's only voter, so nobody can heal it");
            return Err(WalError::from(damage).into());
        }
    }
    let last = snapshot.as_ref().and_then(|snapshot| snapshot.meta.last_log_id);
    Ok(Files { log: opening.finish(last)?, snapshots: files, newest: snapshot })
}

fn is_alone(membership: &Membership, identity: Identity) -> bool {
    membership.voter_ids().all(|voter| voter == identity.node_id)
        && membership.voter_ids().next().is_some()
}
