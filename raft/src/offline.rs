//! What is done to a node's directory while no node runs on it: looking into it, restoring a backup
//! into an empty one, and making a cluster of its own out of a survivor.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::mpsc,
};

use crate::{
    Member, NodeId, SnapshotError, WalError, backup,
    disk::{Disk, HostDisk},
    snapshot::SnapshotFiles,
    storage::SNAPSHOTS,
    types::{
        Incarnation, LeaderId, LogEntry, LogId, MemberNode, Membership, Payload, Snapshot,
        StoredMembership, Vote,
    },
    wal::{
        Identity, Opening, Record, WalOptions,
        recovery::{self, Scan},
    },
};

/// Entries that are written as one batch.
const BATCH_ENTRIES: usize = 256;

/// Why nothing was done with a directory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OfflineError {
    /// The log can't be read or written.
    #[error(transparent)]
    Log(#[from] WalError),
    /// The snapshots can't be read or written.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// It is no backup, or not whole.
    #[error("the backup can't be used: {0}")]
    Backup(String),
    /// There is something already.
    #[error("{path} holds a node's log already: name an empty directory")]
    NotEmpty {
        /// The directory.
        path: PathBuf,
    },
    /// There is nothing.
    #[error("{path} holds no node's log")]
    Nothing {
        /// The directory.
        path: PathBuf,
    },
    /// What is there can't become a state.
    #[error("nothing can be recovered from {path}: {reason}")]
    Unusable {
        /// The directory.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The system gave no random bytes.
    #[error("can't make random bytes")]
    Random(#[source] io::Error),
    /// A new name of a cluster is needed.
    #[error("the new cluster must have another id than the old one, whose members may still live")]
    SameCluster,
}

/// What a directory holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspection {
    /// Whose cluster's it is.
    pub cluster_id: [u8; 16],
    /// Whose it is.
    pub node_id: NodeId,
    /// Names the directory.
    pub incarnation: [u8; 16],
    /// The term of its vote.
    pub term: u64,
    /// Whom it voted for in that term.
    pub voted_for: Option<NodeId>,
    /// Index of the last entry.
    pub last_log: Option<u64>,
    /// Index up to which it knows entries to be committed.
    pub committed: Option<u64>,
    /// Last entry of the newest snapshot that can be read.
    pub snapshot: Option<u64>,
    /// Last entry that was dropped from the log.
    pub purged: Option<u64>,
    /// Voters and learners by id, with their addresses.
    pub members: Vec<(NodeId, String)>,
    /// What is damaged, in sentences.
    pub damage: Vec<String>,
    /// Whether the node must get entries back from its peers before it votes.
    pub healing: bool,
}

/// Looks into a directory without changing it.
///
/// # Errors
/// See [`OfflineError`].
pub fn inspect(directory: &Path) -> Result<Inspection, OfflineError> {
    let scan = Scan::read(&HostDisk, directory, None)?;
    let Some(owner) = scan.owner else {
        return Err(OfflineError::Nothing { path: directory.to_owned() });
    };
    let files = SnapshotFiles::at(HostDisk, directory.join(SNAPSHOTS), owner.identity);
    let (snapshot, mut damage) = newest(&files);
    damage.extend(scan.damage.as_ref().map(ToString::to_string));
    let healing = recovery::healing_reason(&HostDisk, directory)
        .map_err(|source| WalError::Io { act: "read", path: directory.to_owned(), source })?;
    let vote = recovery::greater_vote(scan.recovered.vote, scan.state.vote);
    let membership = effective(&scan, snapshot.as_ref());
    let index = |id: LogId| id.index;
    Ok(Inspection {
        cluster_id: owner.identity.cluster_id,
        node_id: owner.identity.node_id,
        incarnation: owner.incarnation,
        term: vote.map_or(0, |vote| vote.leader_id.term),
        voted_for: vote.map(|vote| vote.leader_id.node_id),
        last_log: last_of(&scan, snapshot.as_ref()).map(index),
        committed: committed_of(&scan, snapshot.as_ref()).map(index),
        snapshot: snapshot.and_then(|snapshot| snapshot.meta.last_log_id).map(index),
        purged: scan.recovered.purged.map(index),
        members: membership.nodes().map(|(id, node)| (*id, node.address.clone())).collect(),
        healing: healing.is_some() || scan.damage.is_some(),
        damage,
    })
}

/// What [`restore`] needs.
#[derive(Debug)]
pub struct Restore<'a> {
    /// Where the node will live; it must hold no log.
    pub directory: &'a Path,
    /// The backup file's bytes.
    pub backup: &'a [u8],
    /// The new cluster's name: never the old one's.
    pub cluster_id: [u8; 16],
    /// The new cluster's only member …
    pub node_id: NodeId,
    /// … and where it listens.
    pub member: Member,
}

/// What was restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// The cluster that the backup came from.
    pub old_cluster_id: [u8; 16],
    /// The last command in it.
    pub index: u64,
    /// The time of that command.
    pub time_ms: u64,
    /// When the backup was taken.
    pub taken_ms: u64,
}

/// Makes a directory that starts as a cluster of one with a backup's state.
///
/// # Errors
/// See [`OfflineError`].
pub fn restore(restore: Restore<'_>) -> Result<Restored, OfflineError> {
    let backup = backup::decode(restore.backup)?;
    if backup.identity.cluster_id == restore.cluster_id {
        return Err(OfflineError::SameCluster);
    }
    let Some(last) = backup.snapshot.meta.last_log_id else {
        return Err(OfflineError::Backup("it is of a cluster that never had a state".to_owned()));
    };
    let new = New::open(restore.directory, restore.cluster_id, restore.node_id)?;
    let node = MemberNode::new(&restore.member, new.incarnation);
    let mut snapshot = backup.snapshot;
    new.adopt(&mut snapshot, &node)?;
    let restored = Restored {
        old_cluster_id: backup.identity.cluster_id,
        index: last.index,
        time_ms: snapshot.snapshot.time_ms,
        taken_ms: backup.taken_ms,
    };
    new.files.save(&snapshot.meta, &snapshot.snapshot)?;
    let vote = Vote::new(last.leader_id.term, restore.node_id);
    new.write(Some(last), vec![Record::Vote(vote)])?;
    Ok(restored)
}

/// What [`recover_alone`] needs.
#[derive(Debug)]
pub struct RecoverAlone<'a> {
    /// The survivor's directory; it stays as it is.
    pub from: &'a Path,
    /// Where the new cluster's only node will live; it must hold no log.
    pub into: &'a Path,
    /// The new cluster's name: never the old one's.
    pub cluster_id: [u8; 16],
    /// Where the node listens. It keeps its id.
    pub member: Member,
}

/// What was recovered, and what may be lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecoveredAlone {
    /// The survivor.
    pub node_id: NodeId,
    /// The cluster it belonged to.
    pub old_cluster_id: [u8; 16],
    /// The last entry it held. Whatever the lost quorum committed after it is gone.
    pub last_log: Option<u64>,
    /// The last entry it knew to be committed.
    pub committed: Option<u64>,
    /// Entries after that one: they become part of the state whether or not the lost quorum had
    /// committed them.
    pub uncertain: u64,
    /// What was damaged on the survivor itself, in sentences.
    pub damage: Vec<String>,
}

/// Makes a cluster of one out of what a survivor holds, after its quorum is lost for ever. All that
/// it holds becomes committed; what only the others held is lost.
///
/// # Errors
/// See [`OfflineError`].
pub fn recover_alone(recover: RecoverAlone<'_>) -> Result<RecoveredAlone, OfflineError> {
    let from = recover.from;
    let _lock = lock_existing(from)?;
    let scan = Scan::read(&HostDisk, from, None)?;
    let Some(owner) = scan.owner else {
        return Err(OfflineError::Nothing { path: from.to_owned() });
    };
    if owner.identity.cluster_id == recover.cluster_id {
        return Err(OfflineError::SameCluster);
    }
    let old_files = SnapshotFiles::at(HostDisk, from.join(SNAPSHOTS), owner.identity);
    let (snapshot, mut damage) = newest(&old_files);
    damage.extend(scan.damage.as_ref().map(ToString::to_string));
    let covered = snapshot.as_ref().and_then(|snapshot| snapshot.meta.last_log_id);
    if covered.map(|id| id.index) < scan.recovered.purged.map(|id| id.index) {
        let reason = "no readable snapshot covers what was dropped from the log".to_owned();
        return Err(OfflineError::Unusable { path: from.to_owned(), reason });
    }
    let Some(last) = last_of(&scan, snapshot.as_ref()) else {
        let reason = "its log is empty".to_owned();
        return Err(OfflineError::Unusable { path: from.to_owned(), reason });
    };
    let committed = committed_of(&scan, snapshot.as_ref());
    let node_id = owner.identity.node_id;
    let new = New::open(recover.into, recover.cluster_id, node_id)?;
    let node = MemberNode::new(&recover.member, new.incarnation);
    if let Some(mut snapshot) = snapshot {
        new.adopt(&mut snapshot, &node)?;
        new.files.save(&snapshot.meta, &snapshot.snapshot)?;
    }
    new.write(covered, records(&scan, covered, last, (node_id, node))?)?;
    Ok(RecoveredAlone {
        node_id,
        old_cluster_id: owner.identity.cluster_id,
        last_log: Some(last.index),
        committed: committed.map(|id| id.index),
        uncertain: last.index.saturating_sub(committed.map_or(0, |id| id.index)),
        damage,
    })
}

/// The survivor's log, and behind it the membership of one, in a term of its own.
fn records(
    scan: &Scan,
    covered: Option<LogId>,
    last: LogId,
    (node_id, node): (NodeId, MemberNode),
) -> Result<Vec<Record>, OfflineError> {
    let recovered = &scan.recovered;
    let vote = recovery::greater_vote(recovered.vote, scan.state.vote);
    let voted = vote.map_or(0, |vote| vote.leader_id.term);
    let term = voted.max(last.leader_id.term).saturating_add(1);
    let mut records = vec![Record::Vote(Vote::new(term, node_id))];
    records.extend(recovered.purged.map(Record::Purge));
    // A log that ends before the snapshot has nothing to add to it.
    let joins = recovered.last() >= covered;
    if joins {
        records.extend(recovered.entries.values().cloned().map(Record::Entry));
    } else {
        records.extend(covered.map(Record::Purge));
    }
    let log_id = LogId::new(LeaderId { term, node_id }, last.index.saturating_add(1));
    let payload = Payload::Membership(alone(node_id, &node)?);
    records.push(Record::Entry(LogEntry { log_id, payload }));
    Ok(records)
}

/// A directory in the making.
struct New {
    opening: Opening<HostDisk>,
    files: SnapshotFiles<HostDisk>,
    node_id: NodeId,
    incarnation: Incarnation,
}

impl New {
    fn open(directory: &Path, cluster_id: [u8; 16], node_id: NodeId) -> Result<Self, OfflineError> {
        let incarnation = random_id().map_err(OfflineError::Random)?;
        let identity = Identity { cluster_id, node_id };
        let not_empty = || OfflineError::NotEmpty { path: directory.to_owned() };
        let opening = Opening::begin(
            HostDisk,
            WalOptions {
                directory: directory.to_owned(),
                identity,
                segment_bytes: HostDisk::SEGMENT_BYTES,
                fresh_incarnation: incarnation,
            },
        );
        let opening = match opening {
            Err(WalError::WrongIdentity { .. } | WalError::Version { .. }) => {
                return Err(not_empty());
            }
            other => other?,
        };
        let files = SnapshotFiles::open(HostDisk, directory.join(SNAPSHOTS), identity)?;
        if !opening.scan().is_fresh() || !files.is_empty()? {
            return Err(not_empty());
        }
        Ok(Self { opening, files, node_id, incarnation })
    }

    /// Makes a snapshot of another cluster one of this, with one member. Whoever else belonged to
    /// the other never comes back under its id.
    fn adopt(&self, snapshot: &mut Snapshot, node: &MemberNode) -> Result<(), OfflineError> {
        let members = snapshot.meta.last_membership.nodes().map(|(id, _)| *id);
        let others: BTreeSet<NodeId> = members.filter(|id| *id != self.node_id).collect();
        snapshot.snapshot.removed.extend(others);
        snapshot.snapshot.removed.remove(&self.node_id);
        snapshot.meta.last_membership =
            StoredMembership::new(snapshot.meta.last_log_id, alone(self.node_id, node)?);
        Ok(())
    }

    /// Writes a log that follows a snapshot.
    fn write(self, snapshot: Option<LogId>, records: Vec<Record>) -> Result<(), OfflineError> {
        let opened = self.opening.finish(snapshot)?;
        opened.wal.start_thread(opened.writer)?;
        let (sender, receiver) = mpsc::channel();
        for batch in records.chunks(BATCH_ENTRIES) {
            let sender = sender.clone();
            let done = move |result| {
                let _ = sender.send(result);
            };
            opened.wal.submit(batch, Some(Box::new(done)));
        }
        drop(sender);
        for result in receiver {
            result.map_err(|source| WalError::Io {
                act: "write the log of the new cluster in",
                path: PathBuf::new(),
                source,
            })?;
        }
        opened.wal.close();
        Ok(())
    }
}

fn alone(node_id: NodeId, node: &MemberNode) -> Result<Membership, OfflineError> {
    let nodes = BTreeMap::from([(node_id, node.clone())]);
    Membership::new(vec![BTreeSet::from([node_id])], nodes)
        .map_err(|error| OfflineError::Backup(error.to_string()))
}

/// The newest readable snapshot, and what is wrong with the others.
fn newest(files: &SnapshotFiles<HostDisk>) -> (Option<Snapshot>, Vec<String>) {
    match files.newest_and_damage() {
        Ok((snapshot, damage)) => (snapshot, damage),
        Err(_) => (None, Vec::new()),
    }
}

fn last_of(scan: &Scan, snapshot: Option<&Snapshot>) -> Option<LogId> {
    scan.recovered.last().max(snapshot.and_then(|snapshot| snapshot.meta.last_log_id))
}

fn committed_of(scan: &Scan, snapshot: Option<&Snapshot>) -> Option<LogId> {
    scan.recovered.committed.max(snapshot.and_then(|snapshot| snapshot.meta.last_log_id))
}

fn effective(scan: &Scan, snapshot: Option<&Snapshot>) -> Membership {
    let snapshotted =
        || snapshot.map(|snapshot| snapshot.meta.last_membership.membership().clone());
    scan.recovered.membership().or_else(snapshotted).unwrap_or_default()
}

/// Refuses a directory that is missing or in use.
fn lock_existing(directory: &Path) -> Result<File, OfflineError> {
    if !directory.is_dir() {
        return Err(OfflineError::Nothing { path: directory.to_owned() });
    }
    let path = directory.join("lock");
    HostDisk
        .lock(&path)
        .map_err(|source| WalError::Io { act: "lock", path, source })?
        .ok_or_else(|| WalError::Locked { path: directory.to_owned() }.into())
}

/// Random bytes from the system.
pub(crate) fn random_id() -> io::Result<[u8; 16]> {
    let mut id = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut id)?;
    Ok(id)
}
