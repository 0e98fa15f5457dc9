//! The transport between nodes: mutual TLS, one framed and multiplexed protocol, three
//! long-lived connections from each node to each peer.
//!
//! ```text
//! connect ─► TLS 1.3, both sides prove a name of the cluster's authority
//!         ─► hello (protocol version, cluster id, node id, incarnation; must match the
//!            certificate's name and the membership)
//!         ─► frames in both directions: requests from the connector, replies from the acceptor
//! ```
//! Consensus traffic has a connection of its own, so neither a snapshot, a large call nor a crowd of
//! proposals delays a heartbeat.

pub(crate) mod channel;
pub(crate) mod client;
pub(crate) mod frame;
pub(crate) mod incarnations;
pub(crate) mod network;
pub(crate) mod server;
pub(crate) mod tls;

use std::{io, net::SocketAddr, time::Duration};

use crate::NodeId;

/// Version of the protocol; a peer of another is refused with a clear answer.
pub(crate) const PROTOCOL_VERSION: u32 = 2;
/// How long a TCP connection, its handshake and its hello may take together.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// What a frame asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Hello = 1,
    Vote = 2,
    PreVote = 3,
    /// One request of an ordered stream of appends.
    Append = 4,
    /// An append that stands alone.
    Heartbeat = 5,
    SnapshotChunk = 6,
    TransferLeader = 7,
    Propose = 16,
    ReadIndex = 17,
    AddVoter = 18,
    Call = 19,
    RemoveVoter = 32,
    /// Which directory a node runs on, and whether it could lead.
    Describe = 33,
    /// The last entry of a leader that a quorum still follows.
    LastLog = 34,
    /// What a node's wall clock shows, and whether it could lead.
    Clock = 35,
    /// Are you there, and still at work on a request? Answered by the connection itself.
    Ping = 36,
    /// The answer to the request of the same id.
    Reply = 128,
    /// The request of the same id was refused; the body is a sentence.
    Refused = 129,
}

impl Kind {
    pub(crate) fn from_byte(byte: u8) -> Option<Self> {
        const ALL: [Kind; 18] = [
            Kind::Hello,
            Kind::Vote,
            Kind::PreVote,
            Kind::Append,
            Kind::Heartbeat,
            Kind::SnapshotChunk,
            Kind::TransferLeader,
            Kind::Propose,
            Kind::ReadIndex,
            Kind::AddVoter,
            Kind::Call,
            Kind::RemoveVoter,
            Kind::Describe,
            Kind::LastLog,
            Kind::Clock,
            Kind::Ping,
            Kind::Reply,
            Kind::Refused,
        ];
        ALL.into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// Why a request got no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TransportError {
    #[error("can't connect to {address}")]
    Connect {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("no connection to {address} within {CONNECT_TIMEOUT:?}")]
    ConnectTimeout { address: SocketAddr },
    #[error("waiting before the next attempt to connect to {address}: {reason}")]
    Backoff { address: SocketAddr, reason: String },
    #[error("{address} is not who it must be: {reason}")]
    Identity { address: SocketAddr, reason: String },
    #[error("the connection was closed")]
    Closed,
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("refused: {0}")]
    Refused(String),
    #[error("a frame of {0} bytes is over the limit")]
    TooLarge(usize),
}

impl TransportError {
    /// Whether the peer can't be reached at all, as opposed to one request having failed.
    pub(crate) fn is_unreachable(&self) -> bool {
        matches!(
            self,
            Self::Connect { .. }
                | Self::ConnectTimeout { .. }
                | Self::Backoff { .. }
                | Self::Identity { .. }
        )
    }
}

/// Why [`crate::Raft::call`] has no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// No member has this id.
    #[error("node {0} is not a member of the cluster")]
    UnknownNode(NodeId),
    /// The request is larger than [`crate::CALL_BYTES_MAX`].
    #[error("a call of {0} bytes is over the limit of {max}", max = crate::CALL_BYTES_MAX)]
    TooLarge(usize),
    /// The peer can't be reached. It has not seen the request.
    #[error("can't reach {peer}: {reason}")]
    Unreachable {
        /// Its id or address.
        peer: String,
        /// What failed.
        reason: String,
    },
    /// The peer gave no answer. It may have acted on the request.
    #[error("no answer from {peer}: {reason}")]
    NoAnswer {
        /// Its id or address.
        peer: String,
        /// What failed.
        reason: String,
    },
    /// The peer refused the request.
    #[error("{peer} refused the call: {reason}")]
    Refused {
        /// Its id or address.
        peer: String,
        /// What it said.
        reason: String,
    },
    /// This node's certificate or the authority's can't be used.
    #[error(transparent)]
    Tls(#[from] tls::TlsError),
}

impl CallError {
    pub(crate) fn from_transport(peer: String, error: &TransportError) -> Self {
        let reason = chain(error);
        match error {
            TransportError::Refused(reason) => Self::Refused { peer, reason: reason.clone() },
            _ if error.is_unreachable() => Self::Unreachable { peer, reason },
            _ => Self::NoAnswer { peer, reason },
        }
    }
}

/// An error and its sources in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(next) = source {
        text.push_str(": ");
        text.push_str(&next.to_string());
        source = next.source();
    }
    text
}
