//! What carries frames between two nodes: mutual TLS over TCP in the product, the links of a
//! simulated world in the simulator. Everything above, from the hello on, is the same code.

use std::{io, net::SocketAddr};

use tokio::{
    io::{AsyncWriteExt, BufReader, ReadHalf, WriteHalf},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_rustls::TlsStream;

use super::{
    TransportError,
    frame::{self, Frame},
    tls::TlsContext,
};
use crate::NodeId;

const READ_BUFFER_BYTES: usize = 64 << 10;

/// How this node reaches others.
pub(crate) enum Wire {
    Tls(TlsContext),
    #[cfg(feature = "sim")]
    Simulated {
        cluster_id: [u8; 16],
    },
}

impl Wire {
    pub(crate) fn cluster_id(&self) -> [u8; 16] {
        match self {
            Self::Tls(tls) => tls.cluster_id,
            #[cfg(feature = "sim")]
            Self::Simulated { cluster_id } => *cluster_id,
        }
    }
}

/// A connection on which both sides still say who they are.
pub(crate) trait Channel: Send + 'static {
    type Source: Source;
    type Sink: Sink;

    fn read(&mut self) -> impl Future<Output = io::Result<Option<Frame>>> + Send;
    fn write(&mut self, frame: &Frame) -> impl Future<Output = io::Result<()>> + Send;
    /// Whether the peer has proved to be this node.
    fn proves(&self, wire: &Wire, node: NodeId) -> bool;
    fn split(self) -> (Self::Source, Self::Sink);
}

/// Frames that come in.
pub(crate) trait Source: Send + 'static {
    /// The next one; `None` when the peer closed between frames.
    fn next(&mut self) -> impl Future<Output = io::Result<Option<Frame>>> + Send;
}

/// Frames that go out.
pub(crate) trait Sink: Send + 'static {
    /// Writes until either side closes.
    fn write_all(
        self,
        frames: mpsc::Receiver<Frame>,
    ) -> impl Future<Output = io::Result<()>> + Send;
}

/// TLS over TCP.
pub(crate) struct TlsChannel(TlsStream<TcpStream>);

impl TlsChannel {
    /// Connects; where the node is known, the handshake proves that it is that one.
    pub(crate) async fn connect(
        tls: &TlsContext,
        expected: Option<NodeId>,
        address: SocketAddr,
    ) -> io::Result<Self> {
        let tcp = TcpStream::connect(address).await?;
        tcp.set_nodelay(true)?;
        let (connector, name) = tls.connector(expected);
        Ok(Self(connector.connect(name, tcp).await?.into()))
    }

    pub(crate) async fn accept(tls: &TlsContext, tcp: TcpStream) -> io::Result<Self> {
        tcp.set_nodelay(true)?;
        Ok(Self(tls.acceptor.accept(tcp).await?.into()))
    }
}

impl Channel for TlsChannel {
    type Source = BufReader<ReadHalf<TlsStream<TcpStream>>>;
    type Sink = WriteHalf<TlsStream<TcpStream>>;

    async fn read(&mut self) -> io::Result<Option<Frame>> {
        frame::read(&mut self.0).await
    }

    async fn write(&mut self, frame: &Frame) -> io::Result<()> {
        let mut bytes = Vec::new();
        frame::encode(frame, &mut bytes);
        self.0.write_all(&bytes).await?;
        self.0.flush().await
    }

    fn proves(&self, wire: &Wire, node: NodeId) -> bool {
        match wire {
            Wire::Tls(tls) => tls.names(self.0.get_ref().1.peer_certificates(), node),
            #[cfg(feature = "sim")]
            Wire::Simulated { .. } => false,
        }
    }

    fn split(self) -> (Self::Source, Self::Sink) {
        let (read_half, write_half) = tokio::io::split(self.0);
        (BufReader::with_capacity(READ_BUFFER_BYTES, read_half), write_half)
    }
}

impl Source for BufReader<ReadHalf<TlsStream<TcpStream>>> {
    async fn next(&mut self) -> io::Result<Option<Frame>> {
        frame::read(self).await
    }
}

impl Sink for WriteHalf<TlsStream<TcpStream>> {
    async fn write_all(self, frames: mpsc::Receiver<Frame>) -> io::Result<()> {
        frame::write_all(self, frames).await
    }
}

/// Where peers connect.
pub(crate) enum Listener {
    Tcp(TcpListener),
    #[cfg(feature = "sim")]
    Simulated(crate::sim::net::Listener),
}

/// Somebody who connected.
pub(crate) enum Accepted {
    Tcp(TcpStream),
    #[cfg(feature = "sim")]
    Simulated(crate::sim::net::Pipe),
}

impl Listener {
    pub(crate) async fn bind(wire: &Wire, address: SocketAddr) -> io::Result<Self> {
        match wire {
            Wire::Tls(_) => Ok(Self::Tcp(TcpListener::bind(address).await?)),
            #[cfg(feature = "sim")]
            Wire::Simulated { .. } => {
                Ok(Self::Simulated(crate::sim::net::Listener::bind(address)?))
            }
        }
    }

    pub(crate) fn address(&self) -> io::Result<SocketAddr> {
        match self {
            Self::Tcp(listener) => listener.local_addr(),
            #[cfg(feature = "sim")]
            Self::Simulated(listener) => Ok(listener.address()),
        }
    }

    pub(crate) async fn accept(&mut self) -> io::Result<(Accepted, SocketAddr)> {
        match self {
            Self::Tcp(listener) => {
                listener.accept().await.map(|(tcp, address)| (Accepted::Tcp(tcp), address))
            }
            #[cfg(feature = "sim")]
            Self::Simulated(listener) => {
                let pipe = listener.accept().await?;
                Ok((Accepted::Simulated(pipe), listener.address()))
            }
        }
    }
}

/// Says why a connection can't be opened.
pub(crate) fn connect_error(address: SocketAddr) -> impl Fn(io::Error) -> TransportError {
    move |source| TransportError::Connect { address, source }
}
