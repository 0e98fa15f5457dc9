//! Connections to peers: opened when needed, kept, and opened again with growing pauses.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::future::{Either, select};
use tokio::sync::{Mutex as AsyncMutex, mpsc, oneshot};

use super::{
    CONNECT_TIMEOUT, CallError, Kind, PROTOCOL_VERSION, TransportError,
    channel::{Channel, Sink, Source, TlsChannel, Wire, connect_error},
    frame::{FRAME_BYTES_MAX, Frame, OUTGOING_FRAMES_MAX},
    incarnations::{self, Incarnations},
    tls::TlsContext,
};
use crate::{
    CALL_BYTES_MAX, NodeId, Tls,
    codec::{DecodeError, Decoder, Encoder},
    runtime::{Instant, Tasks, now, sleep, timeout},
    types::Incarnation,
};

/// First pause after a failed attempt to connect; it doubles …
const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// … up to here.
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// While an answer is awaited, the peer is asked this often whether it is still there …
const PING_EVERY: Duration = Duration::from_secs(2);
/// … and is believed gone when it says nothing for so long.
const PING_TIMEOUT: Duration = Duration::from_secs(8);
/// Requests that wait for an answer on one connection.
const IN_FLIGHT_MAX: usize = 1_024;

/// Which of a peer's connections: what waits on one never delays the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Lane {
    /// Votes, appends and heartbeats.
    Consensus,
    /// Proposals and reads on their way to the leader.
    Forward,
    /// Snapshots and calls.
    Bulk,
}

/// All links of a node.
pub(crate) struct Peers {
    me: NodeId,
    wire: Arc<Wire>,
    pub(crate) incarnations: Arc<Incarnations>,
    links: Mutex<BTreeMap<(NodeId, Lane), Arc<Link>>>,
}

impl Peers {
    pub(crate) fn new(me: NodeId, wire: Arc<Wire>, incarnations: Arc<Incarnations>) -> Arc<Self> {
        Arc::new(Self { me, wire, incarnations, links: Mutex::default() })
    }

    /// The link to a peer; a changed address replaces the link.
    pub(crate) fn link(&self, peer: NodeId, address: SocketAddr, lane: Lane) -> Arc<Link> {
        let mut links = lock(&self.links);
        match links.get(&(peer, lane)) {
            Some(link) if link.address == address => link.clone(),
            _ => {
                let link = Arc::new(Link {
                    me: self.me,
                    peer,
                    address,
                    wire: self.wire.clone(),
                    incarnations: self.incarnations.clone(),
                    state: AsyncMutex::default(),
                    current: Mutex::default(),
                    retry_at: Mutex::default(),
                });
                links.insert((peer, lane), link.clone());
                link
            }
        }
    }

    /// A peer that just connected to us can be reached again at once.
    pub(crate) fn forget_backoff(&self, peer: NodeId) {
        for lane in [Lane::Consensus, Lane::Forward, Lane::Bulk] {
            if let Some(link) = lock(&self.links).get(&(peer, lane)) {
                *lock(&link.retry_at) = None;
            }
        }
    }

    pub(crate) fn close(&self) {
        lock(&self.links).clear();
    }
}

/// The way to one peer on one lane.
pub(crate) struct Link {
    me: NodeId,
    peer: NodeId,
    address: SocketAddr,
    wire: Arc<Wire>,
    incarnations: Arc<Incarnations>,
    /// Held while connecting, so that only one attempt runs.
    state: AsyncMutex<Attempts>,
    current: Mutex<Option<Arc<Connection>>>,
    retry_at: Mutex<Option<Instant>>,
}

#[derive(Default)]
struct Attempts {
    failures: u32,
    reason: String,
}

impl Link {
    /// The open connection, or a new one.
    pub(crate) async fn connection(&self) -> Result<Arc<Connection>, TransportError> {
        if let Some(open) = self.open() {
            return Ok(open);
        }
        let mut attempts = self.state.lock().await;
        if let Some(open) = self.open() {
            return Ok(open);
        }
        let retry_at = *lock(&self.retry_at);
        if retry_at.is_some_and(|at| now() < at) {
            return Err(TransportError::Backoff {
                address: self.address,
                reason: attempts.reason.clone(),
            });
        }
        let expected = Some((self.peer, &*self.incarnations));
        let attempt = Connection::open(&self.wire, self.me, expected, self.address).await;
        match attempt {
            Ok(connection) => {
                *attempts = Attempts::default();
                *lock(&self.retry_at) = None;
                let connection = Arc::new(connection);
                *lock(&self.current) = Some(connection.clone());
                Ok(connection)
            }
            Err(error) => {
                let pause = BACKOFF_MAX.min(BACKOFF_MIN * 2u32.pow(attempts.failures.min(8)));
                attempts.failures = attempts.failures.saturating_add(1);
                attempts.reason = super::chain(&error);
                *lock(&self.retry_at) = Some(now() + pause);
                Err(error)
            }
        }
    }

    /// One request and its answer. A peer that is gone without having closed the connection (it lost
    /// its power, or the way to it), or that knows nothing of the request, is noticed long before a
    /// deadline of minutes.
    pub(crate) async fn request(
        &self,
        kind: Kind,
        body: Vec<u8>,
        deadline: Duration,
    ) -> Result<Vec<u8>, TransportError> {
        let exchange = async {
            let connection = self.connection().await?;
            let answer = connection.send(kind, body).await?;
            let forgotten = std::pin::pin!(connection.forgets(answer.request));
            match select(std::pin::pin!(answer.answer()), forgotten).await {
                Either::Left((answer, _)) => answer,
                Either::Right((error, _)) => Err(error),
            }
        };
        timeout(deadline, exchange).await.unwrap_or(Err(TransportError::Timeout(deadline)))
    }

    fn open(&self) -> Option<Arc<Connection>> {
        let mut current = lock(&self.current);
        if current.as_ref().is_some_and(|connection| connection.is_closed()) {
            *current = None;
        }
        current.clone()
    }
}

type Waiting = BTreeMap<u64, oneshot::Sender<Frame>>;

/// One connection: many requests at a time, answered in any order.
pub(crate) struct Connection {
    outgoing: mpsc::Sender<Frame>,
    /// `None` once the connection is closed.
    waiting: Arc<Mutex<Option<Waiting>>>,
    next_request: AtomicU64,
    /// Reading and writing end with the connection.
    _tasks: Tasks,
}

impl Connection {
    pub(crate) async fn open(
        wire: &Wire,
        me: NodeId,
        expected: Option<(NodeId, &Incarnations)>,
        address: SocketAddr,
    ) -> Result<Self, TransportError> {
        timeout(CONNECT_TIMEOUT, Self::open_inner(wire, me, expected, address))
            .await
            .unwrap_or(Err(TransportError::ConnectTimeout { address }))
    }

    async fn open_inner(
        wire: &Wire,
        me: NodeId,
        expected: Option<(NodeId, &Incarnations)>,
        address: SocketAddr,
    ) -> Result<Self, TransportError> {
        match wire {
            Wire::Tls(tls) => {
                let node = expected.map(|(node, _)| node);
                let channel = TlsChannel::connect(tls, node, address).await;
                let channel = channel.map_err(connect_error(address))?;
                Self::greet(channel, wire, me, expected, address).await
            }
            #[cfg(feature = "sim")]
            Wire::Simulated { .. } => {
                let channel = crate::sim::net::Pipe::connect(address).await;
                let channel = channel.map_err(connect_error(address))?;
                Self::greet(channel, wire, me, expected, address).await
            }
        }
    }

    async fn greet<C: Channel>(
        mut channel: C,
        wire: &Wire,
        me: NodeId,
        expected: Option<(NodeId, &Incarnations)>,
        address: SocketAddr,
    ) -> Result<Self, TransportError> {
        let own = expected.map_or(incarnations::NONE, |(_, incarnations)| incarnations.own);
        let (claimed, incarnation) = say_hello(&mut channel, wire, (me, own), address).await?;
        if expected.is_some_and(|(expected, _)| expected != claimed)
            || !channel.proves(wire, claimed)
        {
            return Err(TransportError::Identity {
                address,
                reason: format!("it says it is node {claimed}"),
            });
        }
        if let Some((node, incarnations)) = expected {
            incarnations
                .check(node, incarnation)
                .map_err(|reason| TransportError::Identity { address, reason })?;
        }
        Ok(Self::start(channel))
    }

    fn start<C: Channel>(channel: C) -> Self {
        let (mut source, sink) = channel.split();
        let (outgoing, frames) = mpsc::channel(OUTGOING_FRAMES_MAX);
        let waiting = Arc::new(Mutex::new(Some(Waiting::new())));
        let mut tasks = Tasks::default();
        let answered = waiting.clone();
        tasks.spawn(async move {
            while let Ok(Some(answer)) = source.next().await {
                let sender = lock(&answered).as_mut().and_then(|all| all.remove(&answer.request));
                if let Some(sender) = sender {
                    let _ = sender.send(answer);
                }
            }
            *lock(&answered) = None;
        });
        let unanswered = waiting.clone();
        tasks.spawn(async move {
            let _ = sink.write_all(frames).await;
            *lock(&unanswered) = None;
        });
        Self { outgoing, waiting, next_request: AtomicU64::new(1), _tasks: tasks }
    }

    pub(crate) fn is_closed(&self) -> bool {
        lock(&self.waiting).is_none()
    }

    /// Returns once the peer is no longer at work on a request. Where it doesn't answer at all, the
    /// connection is closed.
    async fn forgets(&self, request: u64) -> TransportError {
        loop {
            sleep(PING_EVERY).await;
            let mut body = Encoder::default();
            body.u64(request);
            let ping = async { self.send(Kind::Ping, body.0).await?.answer().await };
            match timeout(PING_TIMEOUT, ping).await {
                Ok(Ok(answer)) if answer == [1] => {}
                Ok(Ok(_)) => return TransportError::Closed,
                Ok(Err(error)) => return error,
                Err(_) => {
                    *lock(&self.waiting) = None;
                    return TransportError::Timeout(PING_TIMEOUT);
                }
            }
        }
    }

    /// Sends a request; its answer is awaited apart, so that requests can follow one another.
    pub(crate) async fn send(&self, kind: Kind, body: Vec<u8>) -> Result<Answer, TransportError> {
        if body.len() > FRAME_BYTES_MAX - 64 {
            return Err(TransportError::TooLarge(body.len()));
        }
        let request = self.next_request.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        match lock(&self.waiting).as_mut() {
            None => return Err(TransportError::Closed),
            Some(all) if all.len() >= IN_FLIGHT_MAX => {
                return Err(TransportError::Refused(format!(
                    "{IN_FLIGHT_MAX} requests already wait on this connection"
                )));
            }
            Some(all) => all.insert(request, sender),
        };
        let answer = Answer { request, receiver, waiting: self.waiting.clone() };
        let frame = Frame { request, kind, body };
        self.outgoing.send(frame).await.map_err(|_| TransportError::Closed)?;
        Ok(answer)
    }
}

/// An answer that is on its way.
pub(crate) struct Answer {
    request: u64,
    receiver: oneshot::Receiver<Frame>,
    waiting: Arc<Mutex<Option<Waiting>>>,
}

impl Answer {
    pub(crate) async fn answer(mut self) -> Result<Vec<u8>, TransportError> {
        match (&mut self.receiver).await {
            Err(_) => Err(TransportError::Closed),
            Ok(frame) if frame.kind == Kind::Reply => Ok(frame.body),
            Ok(frame) => {
                Err(TransportError::Refused(String::from_utf8_lossy(&frame.body).into_owned()))
            }
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(all) = lock(&self.waiting).as_mut() {
            all.remove(&self.request);
        }
    }
}

/// Says who we are and returns who the other side says it is.
async fn say_hello<C: Channel>(
    channel: &mut C,
    wire: &Wire,
    (me, incarnation): (NodeId, Incarnation),
    address: SocketAddr,
) -> Result<(NodeId, Incarnation), TransportError> {
    let connect = connect_error(address);
    let mut body = Encoder::default();
    body.u32(PROTOCOL_VERSION);
    body.raw(&wire.cluster_id());
    body.u64(me);
    body.raw(&incarnation);
    let hello = Frame { request: 0, kind: Kind::Hello, body: body.0 };
    channel.write(&hello).await.map_err(&connect)?;
    let answer = channel.read().await.map_err(&connect)?.ok_or(TransportError::Closed)?;
    match answer.kind {
        Kind::Reply => decode_welcome(&answer.body)
            .map_err(|error| TransportError::Identity { address, reason: error.to_string() }),
        _ => Err(TransportError::Identity {
            address,
            reason: String::from_utf8_lossy(&answer.body).into_owned(),
        }),
    }
}

fn decode_welcome(body: &[u8]) -> Result<(NodeId, Incarnation), DecodeError> {
    let mut decoder = Decoder(body);
    let welcome = (decoder.u64()?, decoder.id()?);
    decoder.end()?;
    Ok(welcome)
}

/// Calls for a process that has a certificate of the cluster but no running [`crate::Raft`].
#[derive(Debug)]
pub struct Client;

impl Client {
    /// Sends one request to whatever node listens at `address` and returns its answer, as
    /// [`crate::Raft::call`] does. `me` must be the node that `tls.cert` names.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn call(
        address: SocketAddr,
        tls: &Tls,
        cluster_id: [u8; 16],
        me: NodeId,
        request: Vec<u8>,
        deadline: Duration,
    ) -> Result<Vec<u8>, CallError> {
        if request.len() > CALL_BYTES_MAX {
            return Err(CallError::TooLarge(request.len()));
        }
        let wire = Wire::Tls(TlsContext::new(cluster_id, tls)?);
        let exchange = async {
            let connection = Connection::open(&wire, me, None, address).await?;
            connection.send(Kind::Call, request).await?.answer().await
        };
        let result =
            timeout(deadline, exchange).await.unwrap_or(Err(TransportError::Timeout(deadline)));
        result.map_err(|error| CallError::from_transport(address.to_string(), &error))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
