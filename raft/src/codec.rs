//! The bytes on disk and wire: little-endian, fixed layouts, written by hand so that a new version
//! of openraft can't change them. Golden-byte tests hold them still.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use openraft::{
    EntryPayload,
    raft::{StreamAppendError, VoteRequest as OpenVoteRequest},
};

use crate::{
    NodeId,
    types::{
        AppendRequest, AppendResult, Command, LeaderId, LogEntry, LogId, MemberNode, Membership,
        SnapshotMeta, StoredMembership, Vote, VoteRequest, VoteResponse,
    },
};

/// Nodes or voter sets in one membership.
const MEMBERS_MAX: u32 = 1_024;
/// Removed ids that are remembered.
pub(crate) const REMOVED_MAX: usize = 4_096;
/// Entries in one append request.
const ENTRIES_MAX: u32 = 65_536;

/// What could not be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("can't decode {0}")]
pub(crate) struct DecodeError(pub(crate) &'static str);

/// Appends values to a buffer.
#[derive(Default)]
pub(crate) struct Encoder(pub(crate) Vec<u8>);

impl Encoder {
    pub(crate) fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn raw(&mut self, value: &[u8]) {
        self.0.extend_from_slice(value);
    }

    /// Length as u32, then the bytes. Callers bound what they pass far below 4 GiB.
    pub(crate) fn bytes(&mut self, value: &[u8]) {
        self.u32(u32::try_from(value.len()).unwrap_or(u32::MAX));
        self.raw(value);
    }

    pub(crate) fn option<T>(&mut self, value: Option<T>, put: impl FnOnce(&mut Self, T)) {
        match value {
            None => self.u8(0),
            Some(value) => {
                self.u8(1);
                put(self, value);
            }
        }
    }

    fn leader_id(&mut self, id: &LeaderId) {
        self.u64(id.term);
        self.u64(id.node_id);
    }

    pub(crate) fn log_id(&mut self, id: &LogId) {
        self.leader_id(&id.leader_id);
        self.u64(id.index);
    }

    pub(crate) fn option_log_id(&mut self, id: Option<&LogId>) {
        self.option(id, Self::log_id);
    }

    pub(crate) fn vote(&mut self, vote: &Vote) {
        self.leader_id(&vote.leader_id);
        self.u8(u8::from(vote.committed));
    }

    pub(crate) fn membership(&mut self, membership: &Membership) {
        let configs = membership.get_joint_config();
        self.u32(configs.len() as u32);
        for config in configs {
            self.u32(config.len() as u32);
            for id in config {
                self.u64(*id);
            }
        }
        let nodes: Vec<_> = membership.nodes().collect();
        self.u32(nodes.len() as u32);
        for (id, node) in nodes {
            self.u64(*id);
            self.member_node(node);
        }
    }

    pub(crate) fn member_node(&mut self, node: &MemberNode) {
        self.bytes(node.address.as_bytes());
        self.bytes(node.name.as_bytes());
        self.raw(&node.incarnation);
    }

    /// Callers bound how many there are.
    pub(crate) fn ids(&mut self, ids: &BTreeSet<NodeId>) {
        self.u32(ids.len() as u32);
        for id in ids {
            self.u64(*id);
        }
    }

    pub(crate) fn entry(&mut self, entry: &LogEntry) {
        self.log_id(&entry.log_id);
        match &entry.payload {
            EntryPayload::Blank => self.u8(0),
            EntryPayload::Normal(command) => {
                self.u8(1);
                self.u64(command.time_ms);
                self.raw(&command.id);
                self.bytes(&command.data);
            }
            EntryPayload::Membership(membership) => {
                self.u8(2);
                self.membership(membership);
            }
        }
    }

    pub(crate) fn snapshot_meta(&mut self, meta: &SnapshotMeta) {
        self.option_log_id(meta.last_log_id.as_ref());
        self.option_log_id(meta.last_membership.log_id().as_ref());
        self.membership(meta.last_membership.membership());
    }

    pub(crate) fn vote_request(&mut self, request: &VoteRequest) {
        self.vote(&request.vote);
        self.option_log_id(request.last_log_id.as_ref());
        self.u8(u8::from(request.leadership_transfer));
    }

    pub(crate) fn vote_response(&mut self, response: &VoteResponse) {
        self.vote(&response.vote);
        self.u8(u8::from(response.vote_granted));
        self.option_log_id(response.last_log_id.as_ref());
    }

    pub(crate) fn append_request(&mut self, request: &AppendRequest) {
        self.vote(&request.vote);
        self.option_log_id(request.prev_log_id.as_ref());
        self.option_log_id(request.leader_commit.as_ref());
        self.u32(request.entries.len() as u32);
        for entry in &request.entries {
            self.entry(entry);
        }
    }

    /// `healing` says that the answering node's log lost something: then a conflict below what it
    /// acknowledged before is no surprise.
    pub(crate) fn append_result(&mut self, result: &AppendResult, healing: bool) {
        match result {
            Ok(matching) => {
                self.u8(0);
                self.option_log_id(matching.as_ref());
            }
            Err(StreamAppendError::Conflict(log_id)) => {
                self.u8(if healing { 3 } else { 1 });
                self.log_id(log_id);
            }
            Err(StreamAppendError::HigherVote(vote)) => {
                self.u8(2);
                self.vote(vote);
            }
        }
    }
}

/// Takes values from a slice; every length is checked before it is believed.
pub(crate) struct Decoder<'a>(pub(crate) &'a [u8]);

impl<'a> Decoder<'a> {
    pub(crate) fn take(&mut self, length: usize) -> Result<&'a [u8], DecodeError> {
        let (head, rest) =
            self.0.split_at_checked(length).ok_or(DecodeError("a message that ends early"))?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, DecodeError> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn u32(&mut self) -> Result<u32, DecodeError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(crate) fn id(&mut self) -> Result<[u8; 16], DecodeError> {
        self.array()
    }

    pub(crate) fn bool(&mut self) -> Result<bool, DecodeError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(DecodeError("a truth value")),
        }
    }

    pub(crate) fn bytes(&mut self) -> Result<&'a [u8], DecodeError> {
        let length = self.u32()? as usize;
        self.take(length)
    }

    pub(crate) fn text(&mut self) -> Result<String, DecodeError> {
        let bytes = self.bytes()?;
        String::from_utf8(bytes.to_vec()).map_err(|_| DecodeError("a text that is not UTF-8"))
    }

    /// Everything not taken yet.
    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    pub(crate) fn end(&self) -> Result<(), DecodeError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(DecodeError("a message with bytes after its end"))
        }
    }

    pub(crate) fn option<T>(
        &mut self,
        get: impl FnOnce(&mut Self) -> Result<T, DecodeError>,
    ) -> Result<Option<T>, DecodeError> {
        if self.bool()? { get(self).map(Some) } else { Ok(None) }
    }

    fn count(&mut self, limit: u32, what: &'static str) -> Result<u32, DecodeError> {
        let count = self.u32()?;
        if count > limit { Err(DecodeError(what)) } else { Ok(count) }
    }

    fn leader_id(&mut self) -> Result<LeaderId, DecodeError> {
        Ok(LeaderId { term: self.u64()?, node_id: self.u64()? })
    }

    pub(crate) fn log_id(&mut self) -> Result<LogId, DecodeError> {
        Ok(LogId::new(self.leader_id()?, self.u64()?))
    }

    pub(crate) fn option_log_id(&mut self) -> Result<Option<LogId>, DecodeError> {
        self.option(Self::log_id)
    }

    pub(crate) fn vote(&mut self) -> Result<Vote, DecodeError> {
        Ok(Vote { leader_id: self.leader_id()?, committed: self.bool()? })
    }

    pub(crate) fn membership(&mut self) -> Result<Membership, DecodeError> {
        let mut configs = Vec::new();
        for _ in 0..self.count(MEMBERS_MAX, "a membership of too many voter sets")? {
            let mut voters = BTreeSet::new();
            for _ in 0..self.count(MEMBERS_MAX, "a membership of too many voters")? {
                voters.insert(self.u64()?);
            }
            configs.push(voters);
        }
        let mut nodes: BTreeMap<NodeId, MemberNode> = BTreeMap::new();
        for _ in 0..self.count(MEMBERS_MAX, "a membership of too many nodes")? {
            let id = self.u64()?;
            nodes.insert(id, self.member_node()?);
        }
        Membership::new(configs, nodes).map_err(|_| DecodeError("an inconsistent membership"))
    }

    pub(crate) fn member_node(&mut self) -> Result<MemberNode, DecodeError> {
        Ok(MemberNode { address: self.text()?, name: self.text()?, incarnation: self.id()? })
    }

    pub(crate) fn ids(&mut self) -> Result<BTreeSet<NodeId>, DecodeError> {
        let count = self.count(REMOVED_MAX as u32, "too many removed nodes")?;
        (0..count).map(|_| self.u64()).collect()
    }

    pub(crate) fn entry(&mut self) -> Result<LogEntry, DecodeError> {
        let log_id = self.log_id()?;
        let payload = match self.u8()? {
            0 => EntryPayload::Blank,
            1 => EntryPayload::Normal(Command {
                time_ms: self.u64()?,
                id: self.id()?,
                data: Arc::from(self.bytes()?),
            }),
            2 => EntryPayload::Membership(self.membership()?),
            _ => return Err(DecodeError("an entry of an unknown kind")),
        };
        Ok(LogEntry { log_id, payload })
    }

    pub(crate) fn snapshot_meta(&mut self) -> Result<SnapshotMeta, DecodeError> {
        let last_log_id = self.option_log_id()?;
        let membership_log_id = self.option_log_id()?;
        let membership = self.membership()?;
        Ok(SnapshotMeta {
            last_log_id,
            last_membership: StoredMembership::new(membership_log_id, membership),
        })
    }

    pub(crate) fn vote_request(&mut self) -> Result<VoteRequest, DecodeError> {
        let vote = self.vote()?;
        let mut request = OpenVoteRequest::new(vote, self.option_log_id()?);
        request.leadership_transfer = self.bool()?;
        Ok(request)
    }

    pub(crate) fn vote_response(&mut self) -> Result<VoteResponse, DecodeError> {
        let vote = self.vote()?;
        let granted = self.bool()?;
        Ok(VoteResponse::new(vote, self.option_log_id()?, granted))
    }

    pub(crate) fn append_request(&mut self) -> Result<AppendRequest, DecodeError> {
        let vote = self.vote()?;
        let prev_log_id = self.option_log_id()?;
        let leader_commit = self.option_log_id()?;
        let mut entries = Vec::new();
        for _ in 0..self.count(ENTRIES_MAX, "an append of too many entries")? {
            entries.push(self.entry()?);
        }
        check_consecutive(prev_log_id.as_ref(), &entries)?;
        Ok(AppendRequest { vote, prev_log_id, entries, leader_commit })
    }

    /// The result, and whether the node that sent it is healing.
    pub(crate) fn append_result(&mut self) -> Result<(AppendResult, bool), DecodeError> {
        match self.u8()? {
            0 => Ok((Ok(self.option_log_id()?), false)),
            1 => Ok((Err(StreamAppendError::Conflict(self.log_id()?)), false)),
            2 => Ok((Err(StreamAppendError::HigherVote(self.vote()?)), false)),
            3 => Ok((Err(StreamAppendError::Conflict(self.log_id()?)), true)),
            _ => Err(DecodeError("an append result of an unknown kind")),
        }
    }
}

/// openraft asserts that an append has no hole, so a peer that sends one is refused here.
fn check_consecutive(prev: Option<&LogId>, entries: &[LogEntry]) -> Result<(), DecodeError> {
    let mut expected = prev.map_or(0, |id| id.index.saturating_add(1));
    for entry in entries {
        if entry.log_id.index != expected {
            return Err(DecodeError("an append with a hole in it"));
        }
        expected = expected.saturating_add(1);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log_id(term: u64, node: u64, index: u64) -> LogId {
        LogId::new(LeaderId { term, node_id: node }, index)
    }

    fn normal() -> LogEntry {
        LogEntry {
            log_id: log_id(2, 3, 4),
            payload: EntryPayload::Normal(Command {
                time_ms: 5,
                id: [6; 16],
                data: Arc::from(&b"xy"[..]),
            }),
        }
    }

    fn membership() -> Membership {
        let node = MemberNode { address: "a".into(), name: "b".into(), incarnation: [0x1c; 16] };
        Membership::new(vec![BTreeSet::from([1])], BTreeMap::from([(1, node)])).expect("valid")
    }

    #[test]
    fn an_entry_has_the_bytes_it_had_in_version_1() {
        let mut encoder = Encoder::default();
        encoder.entry(&normal());
        let mut golden = Vec::new();
        for word in [2u64, 3, 4] {
            golden.extend_from_slice(&word.to_le_bytes());
        }
        golden.push(1);
        golden.extend_from_slice(&5u64.to_le_bytes());
        golden.extend_from_slice(&[6; 16]);
        golden.extend_from_slice(&[2, 0, 0, 0, b'x', b'y']);
        assert_eq!(encoder.0, golden);
        let mut decoder = Decoder(&golden);
        assert_eq!(decoder.entry(), Ok(normal()));
        decoder.end().expect("all taken");
    }

    #[test]
    fn a_membership_and_a_vote_have_the_bytes_they_had_in_version_2() {
        let mut encoder = Encoder::default();
        encoder.membership(&membership());
        encoder.vote(&Vote::new_committed(7, 8));
        let mut golden = vec![1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
        golden.extend_from_slice(&[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        golden.extend_from_slice(&[1, 0, 0, 0, b'a', 1, 0, 0, 0, b'b']);
        golden.extend_from_slice(&[0x1c; 16]);
        golden.extend_from_slice(&[7, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(encoder.0, golden);
        let mut decoder = Decoder(&golden);
        assert_eq!(decoder.membership(), Ok(membership()));
        assert_eq!(decoder.vote(), Ok(Vote::new_committed(7, 8)));
    }

    #[test]
    fn every_cut_of_an_append_is_refused_without_panic() {
        let mut encoder = Encoder::default();
        encoder.append_request(&AppendRequest {
            vote: Vote::new_committed(2, 3),
            prev_log_id: Some(log_id(1, 1, 3)),
            entries: vec![normal()],
            leader_commit: None,
        });
        let whole = Decoder(&encoder.0).append_request().expect("whole");
        assert_eq!(whole.entries, vec![normal()]);
        for length in 0..encoder.0.len() {
            assert!(Decoder(&encoder.0[..length]).append_request().is_err());
        }
    }

    #[test]
    fn an_append_with_a_hole_is_refused() {
        let mut encoder = Encoder::default();
        encoder.append_request(&AppendRequest {
            vote: Vote::new_committed(2, 3),
            prev_log_id: Some(log_id(1, 1, 2)),
            entries: vec![normal()],
            leader_commit: None,
        });
        assert_eq!(
            Decoder(&encoder.0).append_request().err(),
            Some(DecodeError("an append with a hole in it"))
        );
    }

    fn bytes_of(put: impl FnOnce(&mut Encoder)) -> Vec<u8> {
        let mut encoder = Encoder::default();
        put(&mut encoder);
        encoder.0
    }

    /// Little-endian words one after the other.
    fn words(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn joined(parts: &[&[u8]]) -> Vec<u8> {
        parts.concat()
    }

    #[test]
    fn votes_on_the_wire_have_the_bytes_they_had_in_version_2() {
        let mut request = VoteRequest::new(Vote::new(7, 8), Some(log_id(2, 3, 4)));
        request.leadership_transfer = true;
        let golden = joined(&[&words(&[7, 8]), &[0, 1], &words(&[2, 3, 4]), &[1]]);
        assert_eq!(bytes_of(|encoder| encoder.vote_request(&request)), golden);
        assert_eq!(Decoder(&golden).vote_request().expect("request").vote, request.vote);
        let response = VoteResponse::new(Vote::new(7, 8), None, true);
        let golden = joined(&[&words(&[7, 8]), &[0, 1, 0]]);
        assert_eq!(bytes_of(|encoder| encoder.vote_response(&response)), golden);
        assert!(Decoder(&golden).vote_response().expect("response").vote_granted);
    }

    #[test]
    fn appends_on_the_wire_have_the_bytes_they_had_in_version_2() {
        let request = AppendRequest {
            vote: Vote::new_committed(2, 3),
            prev_log_id: Some(log_id(2, 3, 3)),
            entries: vec![normal()],
            leader_commit: Some(log_id(1, 1, 2)),
        };
        let entry =
            joined(&[&words(&[2, 3, 4]), &[1], &words(&[5]), &[6; 16], &[2, 0, 0, 0, b'x', b'y']]);
        let golden = joined(&[
            &words(&[2, 3]),
            &[1, 1],
            &words(&[2, 3, 3]),
            &[1],
            &words(&[1, 1, 2]),
            &[1, 0, 0, 0],
            &entry,
        ]);
        assert_eq!(bytes_of(|encoder| encoder.append_request(&request)), golden);
        assert_eq!(Decoder(&golden).append_request().expect("request").entries, [normal()]);
    }

    #[test]
    fn append_results_have_the_bytes_they_had_in_version_2() {
        let at = log_id(1, 2, 3);
        let cases: [(AppendResult, bool, Vec<u8>); 5] = [
            (Ok(None), false, vec![0, 0]),
            (Ok(Some(at)), true, joined(&[&[0, 1], &words(&[1, 2, 3])])),
            (Err(StreamAppendError::Conflict(at)), false, joined(&[&[1], &words(&[1, 2, 3])])),
            (Err(StreamAppendError::Conflict(at)), true, joined(&[&[3], &words(&[1, 2, 3])])),
            (
                Err(StreamAppendError::HigherVote(Vote::new(4, 5))),
                false,
                joined(&[&[2], &words(&[4, 5]), &[0]]),
            ),
        ];
        for (result, healing, golden) in cases {
            assert_eq!(bytes_of(|encoder| encoder.append_result(&result, healing)), golden);
            let (decoded, said_healing) = Decoder(&golden).append_result().expect("decodes");
            assert_eq!(decoded, result);
            let is_conflict = matches!(result, Err(StreamAppendError::Conflict(_)));
            assert_eq!(said_healing, healing && is_conflict);
        }
    }

    #[test]
    fn a_snapshots_head_has_the_bytes_it_had_in_version_2() {
        let meta = SnapshotMeta {
            last_log_id: Some(log_id(1, 2, 3)),
            last_membership: StoredMembership::new(None, membership()),
        };
        let golden = joined(&[
            &[1],
            &words(&[1, 2, 3]),
            &[0],
            &bytes_of(|encoder| encoder.membership(&membership())),
        ]);
        assert_eq!(bytes_of(|encoder| encoder.snapshot_meta(&meta)), golden);
        assert_eq!(Decoder(&golden).snapshot_meta().expect("decodes"), meta);
        let removed = BTreeSet::from([4, 9]);
        let golden = joined(&[&[2, 0, 0, 0], &words(&[4, 9])]);
        assert_eq!(bytes_of(|encoder| encoder.ids(&removed)), golden);
        assert_eq!(Decoder(&golden).ids(), Ok(removed));
    }
}
