//! What a command comes to: an outcome, or a rejection that left the state untouched.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use imbl::OrdMap;
use serde::ser::{SerializeMap, SerializeStruct};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

use super::cluster::Host;
use super::compute::{Flavor, Keypair, ServerGroup};
use super::identity::{Domain, Project, Role, User};
use super::image::Image;
use super::network::{
    FloatingIp, Network, Port, PortForwarding, SecurityGroup, SecurityGroupRule, Subnet,
};
use super::volume::{Attachment, Volume};
use crate::ids::ServerId;

/// How many outcomes are kept for repeated commands.
pub const OUTCOMES_MAX: usize = 4096;

/// What a command that was accepted came to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Outcome {
    /// Done; nothing to show.
    Done,
    /// An observation that no longer matters (an older generation, a thing that is gone).
    Ignored,
    /// A host, as it is now.
    Host(Box<Host>),
    /// A domain, as it is now.
    Domain(Box<Domain>),
    /// A project, as it is now.
    Project(Box<Project>),
    /// A user, as it is now.
    User(Box<User>),
    /// A role, as it is now.
    Role(Box<Role>),
    /// An image, as it is now.
    Image(Box<Image>),
    /// A flavor, as it is now.
    Flavor(Box<Flavor>),
    /// A keypair.
    Keypair(Box<Keypair>),
    /// A server group.
    ServerGroup(Box<ServerGroup>),
    /// A server was made or changed. Its content is read from the state: with user_data
    /// it may be large, and outcomes are kept.
    Server(ServerId),
    /// A volume, as it is now.
    Volume(Box<Volume>),
    /// An attachment, as it is now.
    Attachment(Box<Attachment>),
    /// A network, as it is now.
    Network(Box<Network>),
    /// A subnet, as it is now.
    Subnet(Box<Subnet>),
    /// A port, as it is now.
    Port(Box<Port>),
    /// A security group, as it is now.
    SecurityGroup(Box<SecurityGroup>),
    /// A security group rule.
    SecurityGroupRule(Box<SecurityGroupRule>),
    /// A floating IP, as it is now.
    FloatingIp(Box<FloatingIp>),
    /// A port forwarding.
    PortForwarding(Box<PortForwarding>),
}

/// The kinds of rejection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RejectionKind {
    /// What the command names isn't there.
    NotFound,
    /// Something of that name or id is already there.
    Conflict,
    /// It is there, in a state that doesn't allow this.
    InvalidState,
    /// The project's quota is used up.
    QuotaExceeded,
    /// The request makes no sense.
    Invalid,
    /// Not to be done by anybody (a system role, a protected image).
    Forbidden,
    /// Something else still uses it.
    InUse,
    /// The subnet has no address left.
    AddressesExhausted,
    /// The chosen host no longer fits: propose again.
    PlacementStale,
    /// A limit of the whole cloud is reached.
    TooMany,
}

/// Why a command was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Error)]
#[error("{message}")]
pub struct Rejection {
    /// Of what kind.
    pub kind: RejectionKind,
    /// The kind of resource: `server`, `port` …
    pub resource: String,
    /// Its id or name.
    pub id: String,
    /// In one sentence, for the user.
    pub message: String,
}

impl Rejection {
    /// A rejection with the message in the user's words.
    pub fn new(
        kind: RejectionKind,
        resource: &str,
        id: impl fmt::Display,
        message: impl Into<String>,
    ) -> Self {
        Self { kind, resource: resource.to_owned(), id: id.to_string(), message: message.into() }
    }

    /// `RESOURCE ID could not be found.`
    pub fn not_found(resource: &str, id: impl fmt::Display) -> Self {
        let message = format!("{} {id} could not be found.", capitalised(resource));
        Self::new(RejectionKind::NotFound, resource, id, message)
    }

    /// A rejection of kind `Conflict`.
    pub fn conflict(resource: &str, id: impl fmt::Display, message: impl Into<String>) -> Self {
        Self::new(RejectionKind::Conflict, resource, id, message)
    }

    /// A rejection of kind `Invalid`.
    pub fn invalid(resource: &str, id: impl fmt::Display, message: impl Into<String>) -> Self {
        Self::new(RejectionKind::Invalid, resource, id, message)
    }

    /// A rejection of kind `InvalidState`.
    pub fn state(resource: &str, id: impl fmt::Display, message: impl Into<String>) -> Self {
        Self::new(RejectionKind::InvalidState, resource, id, message)
    }

    /// A rejection of kind `InUse`.
    pub fn in_use(resource: &str, id: impl fmt::Display, message: impl Into<String>) -> Self {
        Self::new(RejectionKind::InUse, resource, id, message)
    }
}

fn capitalised(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

/// The last outcomes by command id, so that a retried command isn't applied twice.
///
/// While a view is held, a write copies each chunk of a map that it touches. Ids are random, so
/// every command touches another chunk of `by_id`: it holds numbers only. Outcomes stand in the
/// order of the log, where one chunk serves many commands in a row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcomes {
    by_id: OrdMap<[u8; 16], u64>,
    by_index: OrdMap<u64, Kept>,
}

type Kept = ([u8; 16], Arc<Result<Outcome, Rejection>>);

impl Outcomes {
    /// The outcome of an earlier command of that id.
    pub fn get(&self, command_id: &[u8; 16]) -> Option<&Result<Outcome, Rejection>> {
        let (_, outcome) = self.by_index.get(self.by_id.get(command_id)?)?;
        Some(outcome)
    }

    /// Keeps an outcome and forgets the oldest ones above the limit.
    pub(crate) fn keep(
        &mut self,
        index: u64,
        command_id: [u8; 16],
        outcome: &Result<Outcome, Rejection>,
    ) {
        self.by_id.insert(command_id, index);
        self.by_index.insert(index, (command_id, Arc::new(outcome.clone())));
        while self.by_index.len() > OUTCOMES_MAX {
            let Some(&(oldest, (id, _))) = self.by_index.get_min() else { break };
            self.by_index.remove(&oldest);
            self.by_id.remove(&id);
        }
    }

    /// How many are kept.
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// True when none is kept.
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }
}

/// In a snapshot: the outcomes by command id, and the ids by index.
impl Serialize for Outcomes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("Outcomes", 2)?;
        fields.serialize_field("by_id", &ById(self))?;
        fields.serialize_field("by_index", &ByIndex(self))?;
        fields.end()
    }
}

struct ById<'a>(&'a Outcomes);

impl Serialize for ById<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let outcomes = self.0;
        let kept = outcomes.by_id.iter().filter_map(|(id, index)| {
            let (_, outcome) = outcomes.by_index.get(index)?;
            Some((id, (index, outcome.as_ref())))
        });
        // `collect_map` would ask the iterator for a length that a filter doesn't know.
        let mut map = serializer.serialize_map(Some(outcomes.by_id.len()))?;
        for (id, value) in kept {
            map.serialize_entry(id, &value)?;
        }
        map.end()
    }
}

struct ByIndex<'a>(&'a Outcomes);

impl Serialize for ByIndex<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.by_index.iter().map(|(index, (id, _))| (index, id)))
    }
}

impl<'de> Deserialize<'de> for Outcomes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Stored {
            by_id: BTreeMap<[u8; 16], (u64, Result<Outcome, Rejection>)>,
        }
        let mut outcomes = Self::default();
        for (id, (index, outcome)) in Stored::deserialize(deserializer)?.by_id {
            outcomes.by_id.insert(id, index);
            outcomes.by_index.insert(index, (id, Arc::new(outcome)));
        }
        Ok(outcomes)
    }
}
