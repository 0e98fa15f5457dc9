//! What one host's agent needs to know: the part of the state that is about it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::ids::{AttachmentId, HostId, NetworkId, PortId, ServerId, SubnetId, VolumeId};
use crate::state::compute::Server;

/// One host's share of the state, in the controller's own words.
#[derive(Clone, Debug, PartialEq)]
pub struct HostView {
    /// The host.
    pub host: HostId,
    /// Servers placed on it.
    pub servers: BTreeMap<ServerId, ServerView>,
    /// Volumes whose home it is.
    pub volumes: BTreeMap<VolumeId, VolumeView>,
    /// Contents (SHA-512, hex) of images that are still in the catalog.
    pub images: BTreeSet<String>,
    /// Whether the content of some image is being uploaded: until that is known, content
    /// that isn't in the catalog may be the one that just came.
    pub uploading: bool,
    /// What its switch is to do.
    pub switch: SwitchView,
    /// Whether others may act in the host's place.
    pub service: Service,
}

/// Whether a host is in service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// It is.
    In,
    /// It was fenced, in this epoch; it may return once it has ended what left it.
    Fenced(u64),
    /// An operator says that it is dead; it returns when the operator lets it.
    ForcedDown,
}

/// What is wanted of a server's guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// It runs.
    Running,
    /// Its disks are there, it does not run.
    Stopped,
    /// Nothing of it is left.
    Gone,
}

/// A server placed on this host.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerView {
    /// What is wanted.
    pub wanted: Wanted,
    /// Whether the state already says so (ACTIVE, SHUTOFF).
    pub settled: bool,
    /// Placement's generation: facts about an older one are ignored.
    pub generation: u64,
    /// The server, for its instance data.
    pub server: Server,
    /// What it boots; absent once the image was deleted, when its root disk must be there.
    pub image: Option<ImageSource>,
    /// Its ports in the order of its network devices.
    pub ports: Vec<Nic>,
    /// Its volumes.
    pub attachments: Vec<AttachmentView>,
}

/// An image's content and where it can be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSource {
    /// SHA-512 of the content, hex.
    pub sha512: String,
    /// Its length.
    pub size_bytes: u64,
    /// Other hosts that hold it.
    pub sources: Vec<Peer>,
}

/// Another host's storage process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The host.
    pub host: HostId,
    /// Where its storage answers.
    pub address: SocketAddr,
    /// The name in its certificate.
    pub server_name: String,
}

/// A server's network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// The port.
    pub port: PortId,
    /// Its MAC address.
    pub mac: String,
    /// The network's MTU.
    pub mtu: u16,
}

/// A volume of a server on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachmentView {
    /// The attachment.
    pub attachment: AttachmentId,
    /// The volume.
    pub volume: VolumeId,
    /// The attachment's generation: the volume's gate admits no older one.
    pub generation: u64,
    /// The volume's size.
    pub size_bytes: u64,
    /// Where the volume is; absent: on this host.
    pub home: Option<Peer>,
    /// Whether the guest should have it.
    pub wanted: bool,
    /// Whether the state already says so.
    pub settled: bool,
}

/// A volume whose home this host is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeView {
    /// Its size.
    pub size_bytes: u64,
    /// Whether it should be there.
    pub wanted: bool,
    /// Whether the state already says that it is.
    pub settled: bool,
    /// The volume's latest generation.
    pub generation: u64,
    /// Who may write to it.
    pub holder: Option<Holder>,
}

/// The server that may write to a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The server.
    pub server: ServerId,
    /// The attachment's generation.
    pub generation: u64,
    /// Whether its guest runs on another host.
    pub remote: bool,
    /// The name in that host's certificate: the volume is exported to it alone.
    pub host: Option<String>,
}

/// What a host's switch is to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SwitchView {
    /// Networks with a port on this host.
    pub networks: Vec<NetworkView>,
    /// Ports of guests on this host.
    pub ports: Vec<PortView>,
    /// Forwards that lead to them.
    pub forwards: Vec<ForwardView>,
}

/// A network with a port on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkView {
    /// The network.
    pub id: NetworkId,
    /// VXLAN network identifier.
    pub vni: u32,
    /// MTU of its guests.
    pub mtu: u16,
    /// Its subnets.
    pub subnets: Vec<SubnetView>,
    /// Its ports on other hosts.
    pub remotes: Vec<RemoteView>,
}

/// A subnet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubnetView {
    /// The subnet.
    pub id: SubnetId,
    /// `address/prefix`.
    pub cidr: String,
    /// Its gateway.
    pub gateway: Option<Ipv4Addr>,
    /// Whether DHCP is answered on it.
    pub dhcp: bool,
    /// Name servers.
    pub dns: Vec<Ipv4Addr>,
    /// Destination and next hop.
    pub host_routes: Vec<(String, Ipv4Addr)>,
}

/// A port on another host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteView {
    /// Its MAC address.
    pub mac: String,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
    /// The other host's tunnel end point.
    pub tunnel: SocketAddr,
}

/// A port of a guest on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortView {
    /// The port.
    pub id: PortId,
    /// Its server.
    pub server: ServerId,
    /// The server's generation.
    pub generation: u64,
    /// Its network.
    pub network: NetworkId,
    /// Its MAC address.
    pub mac: String,
    /// Its addresses.
    pub fixed_ips: Vec<(SubnetId, IpAddr)>,
    /// The name that DHCP hands out.
    pub hostname: String,
    /// Whether anti-spoofing and rules apply.
    pub port_security: bool,
    /// Further addresses: range and MAC.
    pub allowed_address_pairs: Vec<(String, Option<String>)>,
    /// What is permitted.
    pub rules: Vec<RuleView>,
    /// The server's name, for its instance data.
    pub server_name: String,
    /// The server's metadata, for its instance data.
    pub server_metadata: BTreeMap<String, String>,
}

/// One permission of a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleView {
    /// To the guest, otherwise from it.
    pub ingress: bool,
    /// IPv6, otherwise IPv4.
    pub ipv6: bool,
    /// IP protocol number.
    pub protocol: Option<u8>,
    /// Lowest port, or ICMP type.
    pub port_min: Option<u16>,
    /// Highest port, or ICMP code.
    pub port_max: Option<u16>,
    /// The peer's range.
    pub remote_cidr: Option<String>,
}

/// A port of a floating address that leads to a guest on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForwardView {
    /// The port forwarding's id.
    pub id: String,
    /// Floating address and external port.
    pub listen: SocketAddr,
    /// The guest's port.
    pub port: PortId,
    /// Fixed address and internal port.
    pub internal: (Ipv4Addr, u16),
}
