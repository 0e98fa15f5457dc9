//! openraft's network on our transport.

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{
    FutureExt, Stream, StreamExt,
    future::{BoxFuture, Either, select},
    stream::{self, BoxStream},
};
use openraft::{
    OptionalSend, RPCTypes, RaftNetworkFactory, RaftNetworkV2,
    errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable},
    network::RPCOption,
    raft::{
        AppendEntriesResponse, SnapshotResponse, StreamAppendError, TransferLeaderRequest,
        TransferLeaderResponse,
    },
};

use super::{
    Kind, TransportError, chain,
    client::{Answer, Connection, Lane, Link, Peers},
};
use crate::{
    NodeId,
    codec::{DecodeError, Decoder, Encoder},
    runtime::timeout,
    types::{
        AppendRequest, AppendResult, Incarnation, LeaderId, MemberNode, Snapshot, SnapshotData,
        Types, Vote, VoteRequest, VoteResponse,
    },
};

/// A follower may take this long to make an append durable before the stream is given up.
const APPEND_TIMEOUT: Duration = Duration::from_secs(3);
/// Appends on their way to one follower.
const APPENDS_IN_FLIGHT_MAX: usize = 32;
/// Bytes of a snapshot in one frame.
const SNAPSHOT_CHUNK_BYTES: usize = 1 << 20;
const SNAPSHOT_CHUNK_TIMEOUT: Duration = Duration::from_secs(10);
/// The last chunk is answered when the snapshot is installed.
const SNAPSHOT_INSTALL_TIMEOUT: Duration = Duration::from_secs(120);

type RpcError = RPCError<Types>;

/// The last entry that each peer has acknowledged to this node as the leader of one term.
pub(crate) type Acknowledged = Mutex<HashMap<NodeId, (LeaderId, u64)>>;

/// Makes a [`Network`] for each peer.
pub(crate) struct NetworkFactory {
    pub(crate) me: NodeId,
    pub(crate) peers: Arc<Peers>,
    pub(crate) streams: Arc<AtomicU64>,
    pub(crate) acknowledged: Arc<Acknowledged>,
}

impl RaftNetworkFactory<Types> for NetworkFactory {
    type Network = Network;

    async fn new_client(&mut self, target: NodeId, node: &MemberNode) -> Network {
        Network {
            me: self.me,
            target,
            address: node.address.clone(),
            incarnation: node.incarnation,
            peers: self.peers.clone(),
            streams: self.streams.clone(),
            acknowledged: self.acknowledged.clone(),
            heartbeat: false,
        }
    }

    async fn new_heartbeat_client(&mut self, target: NodeId, node: &MemberNode) -> Network {
        Network { heartbeat: true, ..self.new_client(target, node).await }
    }
}

/// One peer as openraft sees it.
pub(crate) struct Network {
    me: NodeId,
    target: NodeId,
    address: String,
    incarnation: Incarnation,
    peers: Arc<Peers>,
    streams: Arc<AtomicU64>,
    acknowledged: Arc<Acknowledged>,
    /// Heartbeats stand alone: they must not end the stream that carries entries.
    heartbeat: bool,
}

impl Network {
    fn link(&self, lane: Lane) -> Result<Arc<Link>, RpcError> {
        let address: SocketAddr = self.address.parse().map_err(|_| {
            RPCError::Unreachable(Unreachable::from_string(format!(
                "node {} has the address {:?}, which is none",
                self.target, self.address
            )))
        })?;
        self.peers.incarnations.expect(self.target, self.incarnation);
        Ok(self.peers.link(self.target, address, lane))
    }

    async fn request(
        &self,
        kind: Kind,
        action: RPCTypes,
        body: Vec<u8>,
        deadline: Duration,
    ) -> Result<Vec<u8>, RpcError> {
        self.link(Lane::Consensus)?
            .request(kind, body, deadline)
            .await
            .map_err(|error| self.error(action, &error))
    }

    fn error(&self, action: RPCTypes, error: &TransportError) -> RpcError {
        match error {
            TransportError::Timeout(timeout) => RPCError::Timeout(Timeout {
                action,
                id: self.me,
                target: self.target,
                timeout: *timeout,
            }),
            _ if error.is_unreachable() => {
                RPCError::Unreachable(Unreachable::from_string(chain(error)))
            }
            _ => RPCError::Network(NetworkError::from_string(chain(error))),
        }
    }
}

fn undecodable(error: DecodeError) -> RpcError {
    RPCError::Network(NetworkError::new(&error))
}

fn decode_append_result(bytes: &[u8]) -> Result<(AppendResult, bool), RpcError> {
    let mut decoder = Decoder(bytes);
    let result = decoder.append_result().map_err(undecodable)?;
    decoder.end().map_err(undecodable)?;
    Ok(result)
}

impl RaftNetworkV2<Types> for Network {
    type SnapshotData = SnapshotData;

    async fn append_entries(
        &mut self,
        rpc: AppendRequest,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<Types>, RpcError> {
        Ok(self.append_alone(&rpc, &option).await?.into())
    }

    /// What carries entries is pipelined: the next append leaves before the last is answered.
    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<'s, Result<BoxStream<'s, Result<AppendResult, RpcError>>, RpcError>>
    where
        S: Stream<Item = AppendRequest> + OptionalSend + Unpin + 'static,
    {
        async move {
            let network: &'s Network = self;
            if network.heartbeat {
                let results = input.then(move |request| {
                    let option = option.clone();
                    async move { network.append_alone(&request, &option).await }
                });
                return Ok(results.boxed());
            }
            // The first request opens the connection: openraft pauses after a failure only where
            // it makes requests, so failing here would make it try again at once, without end.
            let session = AppendSession {
                network,
                connection: None,
                number: network.streams.fetch_add(1, Ordering::Relaxed),
                input: Some(input),
                in_flight: VecDeque::new(),
            };
            let results = stream::unfold(Some(session), |session| async move {
                let mut session = session?;
                let result = session.next().await?;
                let goes_on = matches!(result, Ok(Ok(_)));
                Some((result, goes_on.then_some(session)))
            });
            Ok(results.boxed())
        }
        .boxed()
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest,
        option: RPCOption,
    ) -> Result<VoteResponse, RpcError> {
        self.ask_for_vote(Kind::Vote, &rpc, &option).await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest,
        option: RPCOption,
    ) -> Result<VoteResponse, RpcError> {
        self.ask_for_vote(Kind::PreVote, &rpc, &option).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        let sending = std::pin::pin!(self.send_snapshot(vote, &snapshot));
        let cancel = std::pin::pin!(cancel);
        match select(cancel, sending).await {
            Either::Left((closed, _)) => Err(StreamingError::Closed(closed)),
            Either::Right((result, _)) => result.map_err(StreamingError::from),
        }
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<Types>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<Types>, RpcError> {
        let mut body = Encoder::default();
        body.vote(request.from_leader());
        body.u64(*request.to_node_id());
        body.option_log_id(request.last_log_id());
        self.request(Kind::TransferLeader, RPCTypes::TransferLeader, body.0, option.hard_ttl())
            .await?;
        Ok(Ok(()))
    }
}

impl Network {
    /// A peer that no longer holds what it acknowledged to this very leader has a damaged log, says
    /// so, and gets everything again ([`crate::healing`]). One that doesn't say so runs on an old copy
    /// of its directory: it is cut off, because its vote can't be trusted.
    fn check_acknowledged(
        &self,
        leader: LeaderId,
        (result, healing): (AppendResult, bool),
    ) -> Result<AppendResult, RpcError> {
        let mut all = self.acknowledged.lock().unwrap_or_else(PoisonError::into_inner);
        let known = all.get(&self.target).filter(|(of, _)| *of == leader).map(|(_, index)| *index);
        match &result {
            Ok(Some(matching)) if known.is_none_or(|known| known < matching.index) => {
                all.insert(self.target, (leader, matching.index));
            }
            Err(StreamAppendError::Conflict(_)) if healing => {
                all.remove(&self.target);
            }
            Err(StreamAppendError::Conflict(at))
                if known.is_some_and(|known| at.index <= known) =>
            {
                let reason = format!(
                    "node {} has lost entries that it acknowledged; replace it with `trine cluster replace`",
                    self.target
                );
                tracing::error!(peer = self.target, "{reason}");
                return Err(RPCError::Unreachable(Unreachable::from_string(reason)));
            }
            _ => {}
        }
        Ok(result)
    }

    async fn append_alone(
        &self,
        request: &AppendRequest,
        option: &RPCOption,
    ) -> Result<AppendResult, RpcError> {
        let mut body = Encoder::default();
        body.append_request(request);
        let deadline = option.hard_ttl();
        let answer =
            self.request(Kind::Heartbeat, RPCTypes::AppendEntries, body.0, deadline).await?;
        self.check_acknowledged(request.vote.leader_id, decode_append_result(&answer)?)
    }

    async fn ask_for_vote(
        &self,
        kind: Kind,
        rpc: &VoteRequest,
        option: &RPCOption,
    ) -> Result<VoteResponse, RpcError> {
        let mut body = Encoder::default();
        body.vote_request(rpc);
        let answer = self.request(kind, RPCTypes::Vote, body.0, option.hard_ttl()).await?;
        let mut decoder = Decoder(&answer);
        let response = decoder.vote_response().map_err(undecodable)?;
        decoder.end().map_err(undecodable)?;
        Ok(response)
    }

    /// Sends a snapshot in pieces over the bulk connection.
    async fn send_snapshot(
        &self,
        vote: Vote,
        snapshot: &Snapshot,
    ) -> Result<SnapshotResponse<Types>, RpcError> {
        let link = self.link(Lane::Bulk)?;
        let state = &snapshot.snapshot.state;
        let crc = crc32c::crc32c(state);
        let transfer = self.streams.fetch_add(1, Ordering::Relaxed);
        let mut offset = 0;
        loop {
            let end = state.len().min(offset + SNAPSHOT_CHUNK_BYTES);
            let mut body = Encoder::default();
            body.u64(transfer);
            body.vote(&vote);
            body.snapshot_meta(&snapshot.meta);
            body.u64(snapshot.snapshot.time_ms);
            body.ids(&snapshot.snapshot.removed);
            body.u64(state.len() as u64);
            body.u32(crc);
            body.u64(offset as u64);
            body.raw(&state[offset..end]);
            let is_last = end == state.len();
            let deadline = if is_last { SNAPSHOT_INSTALL_TIMEOUT } else { SNAPSHOT_CHUNK_TIMEOUT };
            let answer = link
                .request(Kind::SnapshotChunk, body.0, deadline)
                .await
                .map_err(|error| self.error(RPCTypes::InstallSnapshot, &error))?;
            let vote = Decoder(&answer).vote().map_err(undecodable)?;
            if is_last {
                return Ok(SnapshotResponse::new(vote));
            }
            offset = end;
        }
    }
}

/// One stream of appends: requests leave as they come, answers arrive in the same order.
struct AppendSession<'s, S> {
    network: &'s Network,
    connection: Option<Arc<Connection>>,
    number: u64,
    input: Option<S>,
    in_flight: VecDeque<InFlight>,
}

struct InFlight {
    leader: LeaderId,
    answer: BoxFuture<'static, Result<Vec<u8>, TransportError>>,
}

impl InFlight {
    fn new(leader: LeaderId, answer: Answer) -> Self {
        let answer = async move {
            timeout(APPEND_TIMEOUT, answer.answer())
                .await
                .unwrap_or(Err(TransportError::Timeout(APPEND_TIMEOUT)))
        };
        Self { leader, answer: answer.boxed() }
    }
}

impl<S: Stream<Item = AppendRequest> + Unpin> AppendSession<'_, S> {
    /// The next answer; sends what can be sent while it waits.
    async fn next(&mut self) -> Option<Result<AppendResult, RpcError>> {
        loop {
            let room = self.in_flight.len() < APPENDS_IN_FLIGHT_MAX;
            let input = self.input.as_mut().filter(|_| room);
            let front = self.in_flight.front_mut();
            let request = match (input, front) {
                (None, None) => return None,
                (Some(input), None) => input.next().await,
                (None, Some(front)) => {
                    let answer = (&mut front.answer).await;
                    return Some(self.finish(answer));
                }
                (Some(input), Some(front)) => match select(&mut front.answer, input.next()).await {
                    Either::Left((answer, _)) => return Some(self.finish(answer)),
                    Either::Right((request, _)) => request,
                },
            };
            let Some(request) = request else {
                self.input = None;
                continue;
            };
            if let Err(error) = self.send(&request).await {
                return Some(Err(error));
            }
        }
    }

    async fn send(&mut self, request: &AppendRequest) -> Result<(), RpcError> {
        let mut body = Encoder::default();
        body.u64(self.number);
        body.append_request(request);
        let error = |error| self.network.error(RPCTypes::AppendEntries, &error);
        let connection = match self.connection.take() {
            Some(open) => open,
            None => self.network.link(Lane::Consensus)?.connection().await.map_err(error)?,
        };
        let connection = self.connection.insert(connection);
        let answer = connection.send(Kind::Append, body.0).await.map_err(error)?;
        let leader = request.vote.leader_id;
        self.in_flight.push_back(InFlight::new(leader, answer));
        Ok(())
    }

    fn finish(
        &mut self,
        answer: Result<Vec<u8>, TransportError>,
    ) -> Result<AppendResult, RpcError> {
        let sent = self.in_flight.pop_front();
        match (answer, sent) {
            (Ok(bytes), Some(sent)) => {
                let result = decode_append_result(&bytes)?;
                self.network.check_acknowledged(sent.leader, result)
            }
            (Ok(_), None) => {
                Err(RPCError::Network(NetworkError::from_string("an answer to nothing")))
            }
            (Err(error), _) => Err(self.network.error(RPCTypes::AppendEntries, &error)),
        }
    }
}
