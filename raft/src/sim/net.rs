//! Links between simulated nodes. A connection carries the product's own frames, one by one, and
//! each fares as its link says: late, lost, twice, or not while the link is cut. Entries of one
//! stream of appends keep their order, as TCP keeps it; other frames may overtake each other.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::sync::mpsc;

use super::{
    node,
    world::{World, current as world},
};
use crate::{
    NodeId,
    transport::{
        Kind,
        channel::{Channel, Sink, Source, Wire},
        frame::Frame,
    },
};

/// Connections that wait to be accepted.
const BACKLOG: usize = 256;
/// How long a frame waits at a cut link before it is lost.
const HELD_MAX: Duration = Duration::from_secs(3);
/// How often a held frame looks whether the link is well again.
const HELD_LOOK: Duration = Duration::from_millis(20);
/// How long connecting over a cut link takes to fail.
const CONNECT_HELD: Duration = Duration::from_secs(1);

/// How frames fare on their way from one node to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Nothing passes.
    pub cut: bool,
    /// The least time that a frame takes …
    pub delay_min: Duration,
    /// … and the most.
    pub delay_max: Duration,
    /// So many of a thousand frames are lost.
    pub loss_per_mille: u32,
    /// So many of a thousand frames come twice.
    pub twice_per_mille: u32,
    /// So many of a thousand frames break their connection.
    pub break_per_mille: u32,
}

impl Default for Link {
    fn default() -> Self {
        Self {
            cut: false,
            delay_min: Duration::from_micros(50),
            delay_max: Duration::from_micros(300),
            loss_per_mille: 0,
            twice_per_mille: 0,
            break_per_mille: 0,
        }
    }
}

/// What the world knows of its links.
#[derive(Default)]
pub(crate) struct Net {
    pub(super) links: BTreeMap<(NodeId, NodeId), Link>,
    listeners: BTreeMap<SocketAddr, (NodeId, mpsc::Sender<Pipe>)>,
}

impl Net {
    /// A node that died listens no more.
    pub(super) fn forget(&mut self, node: NodeId) {
        self.listeners.retain(|_, (id, _)| *id != node);
    }
}

/// Where a simulated node listens.
pub(crate) struct Listener {
    address: SocketAddr,
    incoming: mpsc::Receiver<Pipe>,
}

impl Listener {
    pub(crate) fn bind(address: SocketAddr) -> io::Result<Self> {
        let (world, me) = here()?;
        let (sender, incoming) = mpsc::channel(BACKLOG);
        let mut net = world.net();
        if net.listeners.get(&address).is_some_and(|(_, other)| !other.is_closed()) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        net.listeners.insert(address, (me, sender));
        Ok(Self { address, incoming })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) async fn accept(&mut self) -> io::Result<Pipe> {
        self.incoming.recv().await.ok_or_else(|| io::ErrorKind::ConnectionAborted.into())
    }
}

/// One end of a simulated connection.
pub(crate) struct Pipe {
    peer: NodeId,
    outgoing: mpsc::UnboundedSender<Frame>,
    incoming: mpsc::UnboundedReceiver<Frame>,
}

impl Pipe {
    /// Connects the running node to whoever listens at an address.
    pub(crate) async fn connect(address: SocketAddr) -> io::Result<Self> {
        let (world, me) = here()?;
        let listener = world.net().listeners.get(&address).cloned();
        let (peer, listener) = match listener {
            Some((peer, listener)) => (peer, listener),
            None => {
                world.sleep(Link::default().delay_max).await;
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
        };
        if world.link(me, peer).cut || world.link(peer, me).cut {
            world.sleep(CONNECT_HELD).await;
            return Err(io::ErrorKind::TimedOut.into());
        }
        let link = world.link(me, peer);
        world.sleep(world.between(link.delay_min, link.delay_max)).await;
        let broken = Arc::new(AtomicBool::new(false));
        let (outgoing, there) = direction(&world, me, peer, &broken);
        let (back, incoming) = direction(&world, peer, me, &broken);
        let theirs = Pipe { peer: me, outgoing: back, incoming: there };
        listener.try_send(theirs).map_err(|_| io::ErrorKind::ConnectionRefused)?;
        world.note("connect", &[me.to_le_bytes(), peer.to_le_bytes()].concat());
        Ok(Self { peer, outgoing, incoming })
    }
}

fn here() -> io::Result<(World, NodeId)> {
    match (world(), node::current()) {
        (Some(world), Some(life)) => Ok((world, life.id)),
        _ => Err(io::Error::other("only a simulated node has simulated links")),
    }
}

type Ends = (mpsc::UnboundedSender<Frame>, mpsc::UnboundedReceiver<Frame>);

/// One direction of a connection, and the task that carries its frames.
fn direction(world: &World, from: NodeId, to: NodeId, broken: &Arc<AtomicBool>) -> Ends {
    let (outgoing, frames) = mpsc::unbounded_channel();
    let (deliver, incoming) = mpsc::unbounded_channel();
    let way = Way { world: world.clone(), from, to, deliver, broken: broken.clone() };
    world.spawn(way.carry(frames));
    (outgoing, incoming)
}

#[derive(Clone)]
struct Way {
    world: World,
    from: NodeId,
    to: NodeId,
    deliver: mpsc::UnboundedSender<Frame>,
    broken: Arc<AtomicBool>,
}

impl Way {
    async fn carry(self, mut frames: mpsc::UnboundedReceiver<Frame>) {
        let (in_order, ordered) = mpsc::unbounded_channel();
        let world = self.world.clone();
        world.spawn(self.clone().carry_in_order(ordered));
        while let Some(frame) = frames.recv().await {
            let link = world.link(self.from, self.to);
            if world.chance(link.break_per_mille) {
                self.broken.store(true, Ordering::Relaxed);
            }
            if self.broken.load(Ordering::Relaxed) {
                return;
            }
            if world.chance(link.loss_per_mille) {
                world.note("lose", &[frame.kind as u8]);
                continue;
            }
            let copies = if world.chance(link.twice_per_mille) { 2 } else { 1 };
            for _ in 0..copies {
                let copy =
                    Frame { request: frame.request, kind: frame.kind, body: frame.body.clone() };
                let at = world.now() + world.between(link.delay_min, link.delay_max);
                if matches!(frame.kind, Kind::Append | Kind::Hello | Kind::SnapshotChunk) {
                    let _ = in_order.send((at, copy));
                } else {
                    world.spawn(self.clone().arrive(at, copy));
                }
            }
        }
    }

    async fn carry_in_order(self, mut frames: mpsc::UnboundedReceiver<(Duration, Frame)>) {
        while let Some((at, frame)) = frames.recv().await {
            self.clone().arrive(at, frame).await;
        }
    }

    async fn arrive(self, at: Duration, frame: Frame) {
        self.world.sleep(at.saturating_sub(self.world.now())).await;
        let patience = self.world.now() + HELD_MAX;
        while self.world.link(self.from, self.to).cut {
            if self.world.now() >= patience {
                return;
            }
            self.world.sleep(HELD_LOOK).await;
        }
        if self.broken.load(Ordering::Relaxed) {
            return;
        }
        let mut what = [self.from.to_le_bytes(), self.to.to_le_bytes()].concat();
        what.push(frame.kind as u8);
        what.extend_from_slice(&crc32c::crc32c(&frame.body).to_le_bytes());
        let name = if frame.kind == Kind::SnapshotChunk { "snapshot chunk" } else { "frame" };
        self.world.note(name, &what);
        let _ = self.deliver.send(frame);
    }
}

impl Channel for Pipe {
    type Source = mpsc::UnboundedReceiver<Frame>;
    type Sink = mpsc::UnboundedSender<Frame>;

    async fn read(&mut self) -> io::Result<Option<Frame>> {
        Ok(self.incoming.recv().await)
    }

    async fn write(&mut self, frame: &Frame) -> io::Result<()> {
        let copy = Frame { request: frame.request, kind: frame.kind, body: frame.body.clone() };
        self.outgoing.send(copy).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn proves(&self, _wire: &Wire, node: NodeId) -> bool {
        node == self.peer
    }

    fn split(self) -> (Self::Source, Self::Sink) {
        (self.incoming, self.outgoing)
    }
}

impl Source for mpsc::UnboundedReceiver<Frame> {
    async fn next(&mut self) -> io::Result<Option<Frame>> {
        Ok(self.recv().await)
    }
}

impl Sink for mpsc::UnboundedSender<Frame> {
    async fn write_all(self, mut frames: mpsc::Receiver<Frame>) -> io::Result<()> {
        while let Some(frame) = frames.recv().await {
            self.send(frame).map_err(|_| io::ErrorKind::BrokenPipe)?;
        }
        Ok(())
    }
}
