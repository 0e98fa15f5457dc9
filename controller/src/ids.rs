//! Names of things: one newtype for each kind of id.
//!
//! Ids are strings because identity and flavors allow free-form ones; every other id is
//! a UUID in its hyphenated form, minted by the API and carried in the command. They stand in
//! every table and are copied with its chunks at each write, so their text is shared.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

macro_rules! string_id {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0)
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl From<String> for $name {
            fn from(id: String) -> Self {
                Self(id.into())
            }
        }

        impl From<&str> for $name {
            fn from(id: &str) -> Self {
                Self(id.into())
            }
        }

        impl From<Uuid> for $name {
            fn from(id: Uuid) -> Self {
                Self(id.to_string().into())
            }
        }
    )*};
}

string_id! {
    /// A Keystone domain.
    DomainId;
    /// A project (tenant).
    ProjectId;
    /// A user.
    UserId;
    /// A role.
    RoleId;
    /// An image of the catalog.
    ImageId;
    /// A flavor; free-form, as Nova allows.
    FlavorId;
    /// A server (instance).
    ServerId;
    /// A server group.
    ServerGroupId;
    /// A volume.
    VolumeId;
    /// One attachment of a volume to a server.
    AttachmentId;
    /// A network.
    NetworkId;
    /// A subnet.
    SubnetId;
    /// A port.
    PortId;
    /// A security group.
    SecurityGroupId;
    /// A rule of a security group.
    SecurityGroupRuleId;
    /// A floating IP.
    FloatingIpId;
    /// A port forwarding under a floating IP.
    PortForwardingId;
}

/// A host of the cluster; equal to its Raft node id and never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HostId(pub u64);

impl fmt::Display for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The id of something that exists implicitly (a project's default security group):
/// the same on every replica because it is derived from what it belongs to.
pub fn derived_id(kind: &str, of: &str) -> Uuid {
    Uuid::new_v5(&Uuid::NAMESPACE_URL, format!("trine:{kind}/{of}").as_bytes())
}
