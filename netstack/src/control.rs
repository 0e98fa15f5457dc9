//! What node and switch say to each other over the switch's control socket, one JSON frame of
//! [`abi::control`] each.
//!
//! The socket is mode 0600: whoever can open it is the node. An [`Request::Attach`] or
//! [`Request::Detach`] whose generation is older than the port's latest one is refused as
//! [`ErrorKind::Stale`], so a late message of an earlier guest cannot disturb its successor.

use crate::program::Program;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The version of [`Request`] and [`Reply`] spoken here.
pub const VERSION: u32 = 1;

/// A request and the version it is written in.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Envelope {
    /// [`VERSION`] of the sender.
    pub version: u32,
    /// What is wanted.
    pub request: Request,
}

/// What the node asks of the switch.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Who are you and what do you hold?
    Status,
    /// Replace the program. A port with an error in it is left out and listed in the status, a forward
    /// that cannot listen is listed in the reply; any other error changes nothing.
    Program(Box<Program>),
    /// Connect a guest's rings; the frame carries the three descriptors of
    /// [`abi::packet_ring::Region::descriptors`] in that order. The program may name the port later.
    Attach {
        /// The port.
        port_id: String,
        /// Generation of the guest that owns the rings.
        generation: u64,
    },
    /// Let go of a guest's rings. Detaching what is not attached is done already.
    Detach {
        /// The port.
        port_id: String,
        /// Generation of the guest that owns the rings.
        generation: u64,
    },
    /// Frames and drops so far.
    Counters,
}

/// What the switch answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Attached or detached.
    Done,
    /// The program is in force.
    Programmed {
        /// Forwards that do not listen, and why; the others do.
        forwards_failed: Vec<ForwardFailure>,
    },
    /// The answer to [`Request::Status`].
    Status(Status),
    /// The answer to [`Request::Counters`].
    Counters(Counters),
    /// Nothing was changed.
    Error {
        /// What kind of error.
        kind: ErrorKind,
        /// The thing, the value and the rule.
        message: String,
    },
}

/// Who the switch is and what it holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Process id.
    pub pid: u32,
    /// Minted at start: another value means that the switch came up empty again.
    pub instance: String,
    /// Revision of the program in force; 0 before the first.
    pub revision: u64,
    /// Address and port of the tunnel endpoint.
    pub vtep: String,
    /// Attached rings, by port id.
    pub ports_attached: Vec<AttachedPort>,
    /// Forwards that do not listen.
    pub forwards_failed: Vec<ForwardFailure>,
    /// Ports of the program that were left out.
    #[serde(default)]
    pub ports_rejected: Vec<RejectedPort>,
}

/// A port of the program with an error in it: it is left out, the others are in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RejectedPort {
    /// The port.
    pub port_id: String,
    /// The value and the rule.
    pub message: String,
}

/// One attached pair of rings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachedPort {
    /// The port.
    pub port_id: String,
    /// Generation it was attached with.
    pub generation: u64,
}

/// A forward that does not listen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardFailure {
    /// The forward's id.
    pub id: String,
    /// Why.
    pub message: String,
}

/// Frames and drops since the switch started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Totals by name; dropped frames as `dropped_REASON`.
    pub totals: BTreeMap<String, u64>,
    /// Attached ports by id.
    pub ports: BTreeMap<String, PortCounters>,
}

/// Frames of one attached port since it was attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortCounters {
    /// Frames taken from the guest.
    pub frames_from_guest: u64,
    /// Bytes taken from the guest.
    pub bytes_from_guest: u64,
    /// Frames given to the guest.
    pub frames_to_guest: u64,
    /// Bytes given to the guest.
    pub bytes_to_guest: u64,
    /// Frames lost because the guest did not empty its ring.
    pub dropped_ring_full: u64,
}

/// Why a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The request makes no sense.
    Invalid,
    /// A newer generation of the port is known.
    Stale,
    /// A named limit is reached.
    Limit,
    /// The host refused something.
    Internal,
}
