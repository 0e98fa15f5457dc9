//! The listener: authenticates peers, keeps appends in order, and runs other requests side by side.

use std::{
    collections::BTreeSet,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{
    StreamExt,
    future::BoxFuture,
    stream::{self, BoxStream},
};
use tokio::sync::{Semaphore, mpsc};

use super::{
    CONNECT_TIMEOUT, Kind, PROTOCOL_VERSION,
    channel::{Accepted, Channel, Listener, Sink, Source, TlsChannel, Wire},
    frame::{Frame, OUTGOING_FRAMES_MAX},
    incarnations::{self, Incarnations},
};
use crate::{
    NodeId,
    codec::{DecodeError, Decoder, Encoder},
    runtime::{Tasks, sleep, timeout},
    types::{AppendRequest, AppendResult},
    watch,
};

/// Connections served at a time.
const CONNECTIONS_MAX: usize = 1_024;
/// Requests of one connection that run at a time.
const REQUESTS_MAX: usize = 1_024;
/// Appends of one stream that wait for the log.
const APPENDS_MAX: usize = 64;
/// Pause after `accept` failed, for instance because no descriptor was left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What the transport hands requests to.
pub(crate) trait Requests: Send + Sync + 'static {
    /// Answers one request, or says why not.
    fn handle(
        self: Arc<Self>,
        peer: NodeId,
        kind: Kind,
        body: Vec<u8>,
    ) -> BoxFuture<'static, Result<Vec<u8>, String>>;

    /// Appends in order; results come in the same order, and end after the first failure.
    fn append(
        &self,
        appends: BoxStream<'static, AppendRequest>,
    ) -> BoxStream<'static, Result<AppendResult, String>>;

    /// Whether this node's log lost something that its peers must give back.
    fn is_healing(&self) -> bool;

    /// A peer has connected to us.
    fn peer_connected(&self, peer: NodeId);
}

/// What all connections share.
struct Server<R> {
    wire: Arc<Wire>,
    me: NodeId,
    incarnations: Arc<Incarnations>,
    requests: Arc<R>,
}

/// Who is on the other side.
#[derive(Clone, Copy)]
struct Peer {
    id: NodeId,
    /// It has no directory, so it takes no part in consensus.
    only_calls: bool,
}

/// Returns once the node is told to stop.
pub(crate) async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Accepts connections until told to stop.
pub(crate) async fn serve<R: Requests>(
    mut listener: Listener,
    wire: Arc<Wire>,
    (me, incarnations): (NodeId, Arc<Incarnations>),
    requests: Arc<R>,
    mut stop: watch::Receiver<bool>,
) {
    let server = Arc::new(Server { wire, me, incarnations, requests });
    let mut connections = Tasks::default();
    loop {
        tokio::select! {
            biased;
            () = stopped(&mut stop) => break,
            () = connections.one_ended() => {}
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => match accepted {
                Ok((accepted, address)) => {
                    connections.spawn(server.clone().connection(accepted, address));
                }
                Err(error) => {
                    tracing::warn!(%error, "can't accept a raft connection");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    connections.shutdown().await;
}

impl<R: Requests> Server<R> {
    async fn connection(self: Arc<Self>, accepted: Accepted, address: SocketAddr) {
        match (accepted, &*self.wire) {
            (Accepted::Tcp(tcp), Wire::Tls(tls)) => {
                self.converse(TlsChannel::accept(tls, tcp), address).await;
            }
            #[cfg(feature = "sim")]
            (Accepted::Simulated(pipe), _) => self.converse(async { Ok(pipe) }, address).await,
            #[cfg(feature = "sim")]
            (Accepted::Tcp(_), Wire::Simulated { .. }) => {}
        }
    }

    async fn converse<C: Channel>(
        &self,
        opening: impl Future<Output = io::Result<C>> + Send,
        address: SocketAddr,
    ) {
        let accepted = timeout(CONNECT_TIMEOUT, self.authenticate(opening)).await;
        let (channel, peer) = match accepted {
            Ok(Ok(accepted)) => accepted,
            Ok(Err(error)) => {
                tracing::warn!(%address, %error, "refused a raft connection");
                return;
            }
            Err(_) => {
                tracing::warn!(%address, "a raft connection took too long to say who it is");
                return;
            }
        };
        if !peer.only_calls {
            self.requests.peer_connected(peer.id);
        }
        if let Err(error) = self.serve_peer(channel, peer).await {
            tracing::debug!(%address, peer = peer.id, %error, "a raft connection ended");
        }
    }

    /// TLS, then the hello: the peer's certificate must name the node it says it is.
    async fn authenticate<C: Channel>(
        &self,
        opening: impl Future<Output = io::Result<C>> + Send,
    ) -> io::Result<(C, Peer)> {
        let mut channel = opening.await?;
        let hello = channel.read().await?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let verdict = if hello.kind == Kind::Hello {
            self.check_hello(&hello.body, &channel)
        } else {
            Err("the first frame must be a hello".to_owned())
        };
        let (kind, body) = match &verdict {
            Ok(_) => {
                let mut body = Encoder::default();
                body.u64(self.me);
                body.raw(&self.incarnations.own);
                (Kind::Reply, body.0)
            }
            Err(reason) => (Kind::Refused, reason.clone().into_bytes()),
        };
        let answer = Frame { request: hello.request, kind, body };
        channel.write(&answer).await?;
        verdict
            .map(|peer| (channel, peer))
            .map_err(|reason| io::Error::new(io::ErrorKind::PermissionDenied, reason))
    }

    fn check_hello<C: Channel>(&self, body: &[u8], channel: &C) -> Result<Peer, String> {
        let mut decoder = Decoder(body);
        let text = |error: DecodeError| error.to_string();
        let version = decoder.u32().map_err(text)?;
        if version != PROTOCOL_VERSION {
            return Err(format!("protocol version {version}: this node speaks {PROTOCOL_VERSION}"));
        }
        let cluster_id = decoder.id().map_err(text)?;
        let peer = decoder.u64().map_err(text)?;
        let incarnation = decoder.id().map_err(text)?;
        if cluster_id != self.wire.cluster_id() {
            return Err("this node belongs to another cluster".to_owned());
        }
        if !channel.proves(&self.wire, peer) {
            return Err(format!("the certificate does not name node {peer}"));
        }
        let only_calls = incarnation == incarnations::NONE;
        if !only_calls {
            self.incarnations.check(peer, incarnation)?;
        }
        Ok(Peer { id: peer, only_calls })
    }

    async fn serve_peer<C: Channel>(&self, channel: C, peer: Peer) -> io::Result<()> {
        let (mut source, sink) = channel.split();
        let (outgoing, frames) = mpsc::channel(OUTGOING_FRAMES_MAX);
        let mut tasks = Tasks::default();
        tasks.spawn(async move {
            let _ = sink.write_all(frames).await;
        });
        let permits = Arc::new(Semaphore::new(REQUESTS_MAX));
        let mut appends: Option<AppendStream> = None;
        let at_work = Arc::new(Mutex::new(BTreeSet::new()));
        while let Some(frame) = source.next().await? {
            if peer.only_calls && frame.kind != Kind::Call {
                let refused = Err("a process without a raft directory may only call".to_owned());
                let _ = outgoing.send(answer_frame(frame.request, refused)).await;
                continue;
            }
            if frame.kind == Kind::Ping {
                let answer = pong(&frame.body, &lock(&at_work));
                let _ = outgoing.send(answer_frame(frame.request, answer)).await;
                continue;
            }
            if frame.kind == Kind::Append {
                self.queue_append(&mut appends, frame, &outgoing, &mut tasks, peer.id).await?;
                continue;
            }
            let permit = permits.clone().acquire_owned().await.map_err(io::Error::other)?;
            let (requests, outgoing) = (self.requests.clone(), outgoing.clone());
            let at_work = at_work.clone();
            lock(&at_work).insert(frame.request);
            tasks.spawn(async move {
                let answer = requests.handle(peer.id, frame.kind, frame.body).await;
                let _ = outgoing.send(answer_frame(frame.request, answer)).await;
                // After the answer: who asks now gets it first.
                lock(&at_work).remove(&frame.request);
                drop(permit);
            });
        }
        Ok(())
    }

    /// Appends of one stream go to the log in their order. A new stream number starts afresh,
    /// because a stream ends with its first failure.
    async fn queue_append(
        &self,
        current: &mut Option<AppendStream>,
        frame: Frame,
        outgoing: &mpsc::Sender<Frame>,
        tasks: &mut Tasks,
        peer: NodeId,
    ) -> io::Result<()> {
        let invalid = |error: DecodeError| io::Error::new(io::ErrorKind::InvalidData, error);
        let mut decoder = Decoder(&frame.body);
        let number = decoder.u64().map_err(invalid)?;
        let append = decoder.append_request().map_err(invalid)?;
        decoder.end().map_err(invalid)?;
        if append.vote.leader_id.node_id != peer {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!("node {peer} sent an append in another's name"),
            ));
        }
        if current.as_ref().is_none_or(|stream| stream.number != number) {
            let (stream, answering) = self.start_appends(number, outgoing.clone());
            tasks.spawn(answering);
            *current = Some(stream);
        }
        if let Some(stream) = current {
            // A closed channel means the stream failed; its sender has given it up as well.
            let _ = stream.sender.send((frame.request, append)).await;
        }
        Ok(())
    }

    fn start_appends(
        &self,
        number: u64,
        outgoing: mpsc::Sender<Frame>,
    ) -> (AppendStream, impl Future<Output = ()> + Send + use<R>) {
        let (sender, receiver) = mpsc::channel::<(u64, AppendRequest)>(APPENDS_MAX);
        let (id_sender, mut ids) = mpsc::unbounded_channel();
        let appends = stream::unfold((receiver, id_sender), |(mut receiver, id_sender)| async {
            let (id, append) = receiver.recv().await?;
            id_sender.send(id).ok()?;
            Some((append, (receiver, id_sender)))
        });
        let mut results = self.requests.append(appends.boxed());
        let requests = self.requests.clone();
        let answering = async move {
            while let Some(result) = results.next().await {
                let Some(id) = ids.recv().await else { return };
                let answer = result.map(|result| {
                    let mut body = Encoder::default();
                    body.append_result(&result, requests.is_healing());
                    body.0
                });
                if outgoing.send(answer_frame(id, answer)).await.is_err() {
                    return;
                }
            }
        };
        (AppendStream { number, sender }, answering)
    }
}

struct AppendStream {
    number: u64,
    sender: mpsc::Sender<(u64, AppendRequest)>,
}

/// Whether a request is being worked on.
fn pong(body: &[u8], at_work: &BTreeSet<u64>) -> Result<Vec<u8>, String> {
    let request = Decoder(body).u64().map_err(|error| error.to_string())?;
    Ok(vec![u8::from(at_work.contains(&request))])
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn answer_frame(request: u64, answer: Result<Vec<u8>, String>) -> Frame {
    let (kind, body) = match answer {
        Ok(body) => (Kind::Reply, body),
        Err(reason) => (Kind::Refused, reason.into_bytes()),
    };
    Frame { request, kind, body }
}
