//! A backup: the whole replicated state at one index, as one checked file.
//!
//! ```text
//! magic "TRINEBAK" | version u32 | cluster id 16 | node id u64 | taken_ms u64
//! | meta length u32 | meta | time_ms u64 | removed ids: count u32, u64 each
//! | state length u64 | state | crc32c u32 over all before it
//! ```

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{
    NodeId, Raft, StateMachine, Unavailable,
    codec::{DecodeError, Decoder, Encoder},
    offline::OfflineError,
    types::{Snapshot, SnapshotData, SnapshotMeta, StoredMembership},
    wal::Identity,
};

const MAGIC: &[u8; 8] = b"TRINEBAK";
const VERSION: u32 = 1;

/// What a backup says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupInfo {
    /// The cluster it was taken from.
    pub cluster_id: [u8; 16],
    /// The node that wrote it.
    pub node_id: NodeId,
    /// That node's clock when it was taken, in milliseconds since the Unix epoch.
    pub taken_ms: u64,
    /// The last command in it.
    pub index: u64,
    /// The time of that command.
    pub time_ms: u64,
    /// Who belonged to the cluster.
    pub members: Vec<NodeId>,
    /// What [`StateMachine::snapshot`] wrote.
    pub state: Arc<Vec<u8>>,
}

/// A backup that was read.
pub(crate) struct Backup {
    pub(crate) identity: Identity,
    pub(crate) taken_ms: u64,
    pub(crate) snapshot: Snapshot,
}

impl<S: StateMachine> Raft<S> {
    /// The whole state as of now or later, as the bytes of a backup file.
    ///
    /// # Errors
    /// [`Unavailable`] when no quorum confirms that this node's state is current.
    pub async fn backup(&self) -> Result<Vec<u8>, Unavailable> {
        let core = self.core.clone();
        core.read().await?;
        let picture = core.published.picture();
        let identity =
            Identity { cluster_id: core.config.cluster_id, node_id: core.config.node_id };
        let taken = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let taken_ms = u64::try_from(taken.as_millis()).unwrap_or(u64::MAX);
        let encoding = move || {
            let snapshot = Snapshot {
                meta: SnapshotMeta {
                    last_log_id: picture.last_applied,
                    last_membership: StoredMembership::clone(&picture.membership),
                },
                snapshot: SnapshotData {
                    time_ms: picture.time_ms,
                    removed: picture.removed.as_ref().clone(),
                    state: Arc::new(S::snapshot(&picture.view)),
                },
            };
            encode(&Backup { identity, taken_ms, snapshot })
        };
        tokio::task::spawn_blocking(encoding).await.map_err(|error| Unavailable {
            waited: core.config.read_deadline,
            reason: error.to_string(),
        })
    }
}

/// Reads what a backup says, and checks all of it.
///
/// # Errors
/// [`OfflineError::Backup`] when its bytes are not those of a backup.
pub fn read_backup(bytes: &[u8]) -> Result<BackupInfo, OfflineError> {
    let backup = decode(bytes)?;
    let meta = &backup.snapshot.meta;
    Ok(BackupInfo {
        cluster_id: backup.identity.cluster_id,
        node_id: backup.identity.node_id,
        taken_ms: backup.taken_ms,
        index: meta.last_log_id.map_or(0, |id| id.index),
        time_ms: backup.snapshot.snapshot.time_ms,
        members: meta.last_membership.nodes().map(|(id, _)| *id).collect(),
        state: backup.snapshot.snapshot.state,
    })
}

fn encode(backup: &Backup) -> Vec<u8> {
    let data = &backup.snapshot.snapshot;
    let mut meta = Encoder::default();
    meta.snapshot_meta(&backup.snapshot.meta);
    let mut file = Encoder(Vec::with_capacity(data.state.len() + 512));
    file.raw(MAGIC);
    file.u32(VERSION);
    file.raw(&backup.identity.cluster_id);
    file.u64(backup.identity.node_id);
    file.u64(backup.taken_ms);
    file.bytes(&meta.0);
    file.u64(data.time_ms);
    file.ids(&data.removed);
    file.u64(data.state.len() as u64);
    file.raw(&data.state);
    let crc = crc32c::crc32c(&file.0);
    file.u32(crc);
    file.0
}

pub(crate) fn decode(bytes: &[u8]) -> Result<Backup, OfflineError> {
    let (body, crc) = bytes.split_at(bytes.len().saturating_sub(4));
    let mut decoder = Decoder(body);
    if decoder.take(8).is_ok_and(|magic| magic != MAGIC) || body.len() < 12 {
        return Err(OfflineError::Backup("it does not begin as one".to_owned()));
    }
    match decoder.u32() {
        Ok(VERSION) => {}
        version => {
            let version = version.unwrap_or(0);
            return Err(OfflineError::Backup(format!(
                "it has version {version}, this program reads version {VERSION}"
            )));
        }
    }
    if crc != crc32c::crc32c(body).to_le_bytes() {
        return Err(OfflineError::Backup("its checksum is wrong: it is damaged or cut".to_owned()));
    }
    decode_body(&mut decoder).map_err(|error| OfflineError::Backup(error.to_string()))
}

fn decode_body(decoder: &mut Decoder<'_>) -> Result<Backup, DecodeError> {
    let identity = Identity { cluster_id: decoder.id()?, node_id: decoder.u64()? };
    let taken_ms = decoder.u64()?;
    let mut meta_decoder = Decoder(decoder.bytes()?);
    let meta = meta_decoder.snapshot_meta()?;
    meta_decoder.end()?;
    let time_ms = decoder.u64()?;
    let removed = decoder.ids()?;
    let length = usize::try_from(decoder.u64()?).map_err(|_| DecodeError("a backup's length"))?;
    let state = Arc::new(decoder.take(length)?.to_vec());
    decoder.end()?;
    let snapshot = Snapshot { meta, snapshot: SnapshotData { time_ms, removed, state } };
    Ok(Backup { identity, taken_ms, snapshot })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backup() -> Backup {
        Backup {
            identity: Identity { cluster_id: [9; 16], node_id: 2 },
            taken_ms: 7,
            snapshot: Snapshot {
                meta: SnapshotMeta::default(),
                snapshot: SnapshotData {
                    time_ms: 5,
                    removed: [3].into(),
                    state: Arc::new(b"s".to_vec()),
                },
            },
        }
    }

    #[test]
    fn a_backup_has_the_bytes_it_had_in_version_1() {
        let bytes = encode(&backup());
        let mut golden = b"TRINEBAK\x01\0\0\0".to_vec();
        golden.extend_from_slice(&[9; 16]);
        golden.extend_from_slice(&[2, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]);
        golden.extend_from_slice(&[10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        golden.extend_from_slice(&[5, 0, 0, 0, 0, 0, 0, 0]);
        golden.extend_from_slice(&[1, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
        golden.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0, b's']);
        assert_eq!(bytes[..bytes.len() - 4], golden);
    }

    #[test]
    fn every_cut_and_flipped_bit_of_a_backup_is_refused() {
        let bytes = encode(&backup());
        let info = read_backup(&bytes).expect("whole");
        assert_eq!((info.taken_ms, info.time_ms, info.state.as_slice()), (7, 5, &b"s"[..]));
        for length in 0..bytes.len() {
            assert!(read_backup(&bytes[..length]).is_err(), "cut to {length}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(read_backup(&damaged).is_err(), "bit {bit}");
        }
    }
}
