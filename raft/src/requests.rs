//! What peers ask of this node.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{Arc, PoisonError},
};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream::BoxStream};
use openraft::{
    async_runtime::watch::WatchReceiver,
    raft::{AppendEntriesResponse, StreamAppendError, TransferLeaderRequest},
};

use crate::{
    NodeId, StateMachine,
    codec::{Decoder, Encoder},
    node::Core,
    proposals::Attempt,
    runtime::{Instant, now, spawn, timeout},
    snapshot::SNAPSHOT_BYTES_MAX,
    transport::TransportError,
    transport::{Kind, client::Lane, server::Requests},
    types::{AppendRequest, AppendResult, Snapshot, SnapshotData, SnapshotMeta, Vote},
};

/// A snapshot that arrives in pieces.
pub(crate) struct Incoming {
    transfer: u64,
    state: Vec<u8>,
}

/// One piece.
struct Chunk<'a> {
    transfer: u64,
    vote: Vote,
    meta: SnapshotMeta,
    time_ms: u64,
    removed: BTreeSet<NodeId>,
    length: usize,
    crc: u32,
    offset: usize,
    bytes: &'a [u8],
}

impl<S: StateMachine> Requests for Core<S> {
    fn handle(
        self: Arc<Self>,
        peer: NodeId,
        kind: Kind,
        body: Vec<u8>,
    ) -> BoxFuture<'static, Result<Vec<u8>, String>> {
        async move {
            match kind {
                Kind::Vote | Kind::PreVote => self.handle_vote(peer, kind, &body).await,
                Kind::Heartbeat => self.handle_heartbeat(peer, &body).await,
                Kind::SnapshotChunk => self.handle_chunk(peer, &body).await,
                Kind::TransferLeader => self.handle_transfer(peer, &body).await,
                Kind::Propose => self.handle_propose(&body).await,
                Kind::ReadIndex => Ok(self.local_reads.join().await.encode(Encoder::u64)),
                Kind::AddVoter => self.handle_add_voter(&body).await,
                Kind::RemoveVoter => self.handle_remove_voter(&body).await,
                Kind::Describe => Ok(self.handle_describe()),
                Kind::LastLog => Ok(self.handle_last_log().await),
                Kind::Call => Ok(self.calls.call(peer, body).await),
                Kind::Clock => Ok(self.handle_clock()),
                Kind::Hello | Kind::Append | Kind::Ping | Kind::Reply | Kind::Refused => {
                    Err(format!("{kind:?} is not a request"))
                }
            }
        }
        .boxed()
    }

    fn append(
        &self,
        appends: BoxStream<'static, AppendRequest>,
    ) -> BoxStream<'static, Result<AppendResult, String>> {
        self.raft
            .stream_append(appends)
            .map(|result| result.map_err(|fatal| fatal.to_string()))
            .boxed()
    }

    fn is_healing(&self) -> bool {
        self.healing.borrow().is_some()
    }

    fn peer_connected(&self, peer: NodeId) {
        self.peers.forget_backoff(peer);
        let raft = self.raft.clone();
        drop(spawn(async move { raft.trigger().reset_backoff([peer]).await }));
    }
}

impl<S: StateMachine> Core<S> {
    async fn handle_vote(&self, peer: NodeId, kind: Kind, body: &[u8]) -> Result<Vec<u8>, String> {
        let mut decoder = Decoder(body);
        let request = decoder.vote_request().map_err(text)?;
        decoder.end().map_err(text)?;
        check_sender(peer, &request.vote)?;
        // A node gets its log before its vote. One without a log may have lost it, and with it the
        // memory of what it voted for and acknowledged.
        if self.raft.metrics().borrow_watched().last_log_index.is_none() {
            return Err(format!("node {} has no log and so no vote", self.config.node_id));
        }
        self.check_whole()?;
        let response = match kind {
            Kind::PreVote => self.raft.pre_vote(request).await,
            _ => self.raft.vote(request).await,
        };
        let mut answer = Encoder::default();
        answer.vote_response(&response.map_err(text)?);
        Ok(answer.0)
    }

    /// A node whose log lost something has no say in elections ([`crate::healing`]).
    fn check_whole(&self) -> Result<(), String> {
        if self.healing.borrow().is_none() {
            return Ok(());
        }
        Err(format!("node {} abstains until its damaged log is healed", self.config.node_id))
    }

    async fn handle_heartbeat(&self, peer: NodeId, body: &[u8]) -> Result<Vec<u8>, String> {
        let mut decoder = Decoder(body);
        let request = decoder.append_request().map_err(text)?;
        decoder.end().map_err(text)?;
        check_sender(peer, &request.vote)?;
        let prev = request.prev_log_id;
        let last = request.entries.last().map(|entry| entry.log_id).or(prev);
        let response = self.raft.append_entries(request).await.map_err(text)?;
        let result: AppendResult = match response {
            AppendEntriesResponse::Success => Ok(last),
            AppendEntriesResponse::PartialSuccess(matching) => Ok(matching),
            AppendEntriesResponse::Conflict => match prev {
                Some(prev) => Err(StreamAppendError::Conflict(prev)),
                None => Ok(None),
            },
            AppendEntriesResponse::HigherVote(vote) => Err(StreamAppendError::HigherVote(vote)),
        };
        let mut answer = Encoder::default();
        answer.append_result(&result, self.is_healing());
        Ok(answer.0)
    }

    async fn handle_chunk(&self, peer: NodeId, body: &[u8]) -> Result<Vec<u8>, String> {
        let chunk = decode_chunk(body).map_err(text)?;
        check_sender(peer, &chunk.vote)?;
        if chunk.length > SNAPSHOT_BYTES_MAX {
            return Err(format!("a snapshot of {} bytes is over the limit", chunk.length));
        }
        if chunk.meta.last_log_id.is_some_and(|id| id.leader_id > chunk.vote.leader_id) {
            return Err("a snapshot from a later leader than its sender".to_owned());
        }
        let Some(state) = self.collect(peer, &chunk)? else {
            return Ok(encode_vote(&chunk.vote));
        };
        if crc32c::crc32c(&state) != chunk.crc {
            return Err("the snapshot's checksum is wrong".to_owned());
        }
        let snapshot = Snapshot {
            meta: chunk.meta,
            snapshot: SnapshotData {
                time_ms: chunk.time_ms,
                removed: chunk.removed,
                state: Arc::new(state),
            },
        };
        let response = self.raft.install_full_snapshot(chunk.vote, snapshot).await;
        Ok(encode_vote(&response.map_err(text)?.vote))
    }

    /// Adds a piece to what the peer sent before; returns the whole when it was the last.
    fn collect(&self, peer: NodeId, chunk: &Chunk<'_>) -> Result<Option<Vec<u8>>, String> {
        let mut all = self.incoming.lock().unwrap_or_else(PoisonError::into_inner);
        if chunk.offset == 0 {
            let fresh = Incoming { transfer: chunk.transfer, state: Vec::new() };
            all.insert(peer, fresh);
        }
        let expected = all.get_mut(&peer).filter(|incoming| {
            incoming.transfer == chunk.transfer && incoming.state.len() == chunk.offset
        });
        let Some(incoming) = expected else {
            return Err("a piece of a snapshot that does not continue the last".to_owned());
        };
        incoming.state.extend_from_slice(chunk.bytes);
        if incoming.state.len() > chunk.length {
            all.remove(&peer);
            return Err("a snapshot longer than it said".to_owned());
        }
        if incoming.state.len() == chunk.length {
            return Ok(all.remove(&peer).map(|incoming| incoming.state));
        }
        Ok(None)
    }

    async fn handle_transfer(&self, peer: NodeId, body: &[u8]) -> Result<Vec<u8>, String> {
        let mut decoder = Decoder(body);
        let vote = decoder.vote().map_err(text)?;
        let to = decoder.u64().map_err(text)?;
        let last_log_id = decoder.option_log_id().map_err(text)?;
        check_sender(peer, &vote)?;
        if to == self.config.node_id {
            self.check_whole()?;
        }
        let request = TransferLeaderRequest::new(vote, to, last_log_id);
        match self.raft.handle_transfer_leader(request).await.map_err(text)? {
            Ok(()) => Ok(Vec::new()),
            Err(error) => Err(error.to_string()),
        }
    }

    async fn handle_propose(&self, body: &[u8]) -> Result<Vec<u8>, String> {
        let mut decoder = Decoder(body);
        let command_id = decoder.id().map_err(text)?;
        let command = decoder.rest().to_vec();
        let attempt = self.propose_here(command_id, command).await;
        Ok(attempt.encode(|body, proposed| {
            body.u64(proposed.index);
            body.raw(&proposed.outcome);
        }))
    }

    async fn handle_add_voter(&self, body: &[u8]) -> Result<Vec<u8>, String> {
        let mut decoder = Decoder(body);
        let id = decoder.u64().map_err(text)?;
        let node = decoder.member_node().map_err(text)?;
        let attempt = timeout(self.config.propose_deadline, self.add_voter_here(id, node))
            .await
            .unwrap_or_else(|_| Attempt::Retry(format!("node {id} has not caught up yet")));
        Ok(attempt.encode(Encoder::u64))
    }

    async fn handle_remove_voter(&self, body: &[u8]) -> Result<Vec<u8>, String> {
        let mut decoder = Decoder(body);
        let id = decoder.u64().map_err(text)?;
        decoder.end().map_err(text)?;
        Ok(self.remove_voter_here(id).await.encode(Encoder::u64))
    }

    /// Asks a member that is not this node.
    pub(crate) async fn ask(
        &self,
        member: NodeId,
        lane: Lane,
        kind: Kind,
        body: Vec<u8>,
        deadline: Instant,
    ) -> Result<Vec<u8>, TransportError> {
        let Some(address) = self.address_of(member) else {
            return Err(TransportError::Refused(format!("node {member} is not a member")));
        };
        let left = openraft::Instant::saturating_duration_since(&deadline, now());
        self.peers.link(member, address, lane).request(kind, body, left).await
    }

    pub(crate) fn address_of(&self, member: NodeId) -> Option<SocketAddr> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        metrics.membership_config.get_node(&member)?.address.parse().ok()
    }
}

/// A peer speaks only for itself.
fn check_sender(peer: NodeId, vote: &Vote) -> Result<(), String> {
    if vote.leader_id.node_id == peer {
        return Ok(());
    }
    Err(format!("node {peer} speaks in the name of node {}", vote.leader_id.node_id))
}

fn decode_chunk(body: &[u8]) -> Result<Chunk<'_>, crate::codec::DecodeError> {
    let mut decoder = Decoder(body);
    Ok(Chunk {
        transfer: decoder.u64()?,
        vote: decoder.vote()?,
        meta: decoder.snapshot_meta()?,
        time_ms: decoder.u64()?,
        removed: decoder.ids()?,
        length: usize::try_from(decoder.u64()?).unwrap_or(usize::MAX),
        crc: decoder.u32()?,
        offset: usize::try_from(decoder.u64()?).unwrap_or(usize::MAX),
        bytes: decoder.rest(),
    })
}

fn encode_vote(vote: &Vote) -> Vec<u8> {
    let mut answer = Encoder::default();
    answer.vote(vote);
    answer.0
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
