//! Security groups with state: a packet passes if it belongs to a connection that was admitted, or if
//! a rule permits the connection it opens.
//!
//! Each secured port tracks for itself, so a connection between two local guests has two entries.
//! The table is bounded per port and in all; what a port's guest opens beyond that is dropped, and
//! no other port notices. A connection without a SYN is picked up where the rules permit it, so that
//! flows survive a restart of the switch.
//!
//! ```text
//! TCP entry: Opening ──reply──► Established ──FIN──► Closing ──SYN──► (asked again)
//!               └──────────────RST──────────────────────┘
//! ```

use super::{DropReason, Verdict, spoof};
use crate::compile::{Opening, PortTable, Target};
use crate::program::{Direction, Ethertype};
use crate::wire::{self, Mac, Packet, Transport};
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddrV4};

/// Most connections tracked.
pub(crate) const CONNECTIONS_MAX: usize = 262_144;
/// Most connections tracked for one port.
pub(crate) const CONNECTIONS_PER_PORT_MAX: u32 = 16_384;

const OPENING_MS: u64 = 60_000;
const ESTABLISHED_MS: u64 = 24 * 3600 * 1000;
const CLOSING_MS: u64 = 60_000;
const RESET_MS: u64 = 10_000;
const DATAGRAM_MS: u64 = 30_000;
const DATAGRAM_REPLIED_MS: u64 = 180_000;
const FRAGMENT_MS: u64 = 30_000;

/// A packet seen on its way to or from a port.
pub(super) struct Sighting<'a> {
    pub(super) port: &'a PortTable,
    pub(super) vni: u32,
    pub(super) packet: &'a Packet,
    pub(super) bytes: &'a [u8],
    pub(super) direction: Direction,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    vni: u32,
    mac: Mac,
    kind: Kind,
    protocol: u8,
    guest: IpAddr,
    remote: IpAddr,
    guest_port: u16,
    remote_port: u16,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Connection,
    /// The fragments of one packet after the first, by its identification.
    Fragments(Direction),
}

struct Entry {
    opening: Opening,
    epoch: u64,
    expires_ms: u64,
    replied: bool,
    closing: bool,
}

#[derive(Default)]
pub(crate) struct Connections {
    entries: HashMap<Key, Entry>,
    per_port: HashMap<(u32, Mac), u32>,
}

impl Connections {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn sweep(&mut self, now_ms: u64) {
        let per_port = &mut self.per_port;
        self.entries.retain(|key, entry| {
            let live = entry.expires_ms > now_ms;
            if !live {
                release(per_port, key);
            }
            live
        });
    }

    /// Whether a packet of a secured port passes.
    pub(super) fn admit(&mut self, sighting: &Sighting<'_>, now_ms: u64, epoch: u64) -> Verdict {
        let packet = sighting.packet;
        if spoof::is_neighbour_discovery(packet) {
            return Ok(());
        }
        if let Transport::LaterFragment { ident } = packet.transport {
            return self.admit_known(&sighting.fragments(ident), sighting, now_ms, epoch);
        }
        if let Some(key) = sighting.quoted()
            && self.known(&key, sighting.port, now_ms, epoch).is_some()
        {
            return Ok(());
        }
        self.admit_connection(sighting, now_ms, epoch)?;
        if let Some(ident) = packet.first_fragment {
            let entry = Entry::new(sighting.opening(), epoch, now_ms + FRAGMENT_MS);
            self.insert(sighting.fragments(ident), entry)?;
        }
        Ok(())
    }

    /// Opens the connection of a forward, which comes from the switch's own address on behalf of
    /// `client`; `when` is the time and the tables' epoch.
    pub(super) fn open_forward(
        &mut self,
        port: &PortTable,
        vni: u32,
        client: IpAddr,
        service: SocketAddrV4,
        guest: SocketAddrV4,
        (now_ms, epoch): (u64, u64),
    ) -> Verdict {
        if !port.secured {
            return Ok(());
        }
        let opening = Opening {
            direction: Direction::Ingress,
            ethertype: Ethertype::Ipv4,
            protocol: wire::TCP,
            target: Some(Target::Port(guest.port())),
            remote: client,
        };
        if !port.permits(&opening) {
            return Err(DropReason::SecurityIngress);
        }
        let key = Key {
            vni,
            mac: port.mac,
            kind: Kind::Connection,
            protocol: wire::TCP,
            guest: IpAddr::V4(*guest.ip()),
            remote: IpAddr::V4(*service.ip()),
            guest_port: guest.port(),
            remote_port: service.port(),
        };
        self.remove(&key);
        self.insert(key, Entry::new(opening, epoch, now_ms + OPENING_MS))
    }

    fn admit_known(
        &mut self,
        key: &Key,
        sighting: &Sighting<'_>,
        now_ms: u64,
        epoch: u64,
    ) -> Verdict {
        match self.known(key, sighting.port, now_ms, epoch) {
            Some(_) => Ok(()),
            None => Err(refusal(sighting.direction)),
        }
    }

    fn admit_connection(&mut self, sighting: &Sighting<'_>, now_ms: u64, epoch: u64) -> Verdict {
        let key = sighting.connection();
        if let Some(key) = &key
            && let Some(entry) = self.known(key, sighting.port, now_ms, epoch)
        {
            if !(entry.closing && is_first(sighting.packet)) {
                entry.seen(sighting, now_ms);
                return Ok(());
            }
            self.remove(key);
        }
        let opening = sighting.opening();
        if !sighting.port.permits(&opening) {
            return Err(refusal(sighting.direction));
        }
        match key {
            Some(key) => {
                let mut entry = Entry::new(opening, epoch, 0);
                entry.seen(sighting, now_ms);
                self.insert(key, entry)
            }
            None => Ok(()),
        }
    }

    /// The live entry of a key, if the tables in force still permit what it was opened as.
    fn known(
        &mut self,
        key: &Key,
        port: &PortTable,
        now_ms: u64,
        epoch: u64,
    ) -> Option<&mut Entry> {
        let entry = self.entries.get_mut(key)?;
        let live = entry.expires_ms > now_ms;
        if !live || (entry.epoch != epoch && !port.permits(&entry.opening)) {
            self.remove(key);
            return None;
        }
        let entry = self.entries.get_mut(key)?;
        entry.epoch = epoch;
        Some(entry)
    }

    fn insert(&mut self, key: Key, entry: Entry) -> Verdict {
        let count = self.per_port.entry((key.vni, key.mac)).or_insert(0);
        if self.entries.len() >= CONNECTIONS_MAX || *count >= CONNECTIONS_PER_PORT_MAX {
            return Err(DropReason::ConnectionsFull);
        }
        if self.entries.insert(key, entry).is_none() {
            *count += 1;
        }
        Ok(())
    }

    fn remove(&mut self, key: &Key) {
        if self.entries.remove(key).is_some() {
            release(&mut self.per_port, key);
        }
    }
}

fn release(per_port: &mut HashMap<(u32, Mac), u32>, key: &Key) {
    let owner = (key.vni, key.mac);
    if let Some(count) = per_port.get_mut(&owner) {
        *count = count.saturating_sub(1);
        if *count == 0 {
            per_port.remove(&owner);
        }
    }
}

fn refusal(direction: Direction) -> DropReason {
    match direction {
        Direction::Ingress => DropReason::SecurityIngress,
        Direction::Egress => DropReason::SecurityEgress,
    }
}

/// Whether the packet asks for a new TCP connection.
fn is_first(packet: &Packet) -> bool {
    matches!(packet.transport, Transport::Tcp { flags, .. } if flags & (wire::SYN | wire::ACK) == wire::SYN)
}

impl Entry {
    fn new(opening: Opening, epoch: u64, expires_ms: u64) -> Entry {
        Entry { opening, epoch, expires_ms, replied: false, closing: false }
    }

    fn seen(&mut self, sighting: &Sighting<'_>, now_ms: u64) {
        self.replied |= sighting.direction != self.opening.direction;
        let lifetime_ms = match sighting.packet.transport {
            Transport::Tcp { flags, .. } => {
                self.closing |= flags & (wire::FIN | wire::RST) != 0;
                match (flags & wire::RST != 0, self.closing, self.replied) {
                    (true, ..) => RESET_MS,
                    (_, true, _) => CLOSING_MS,
                    (_, _, true) => ESTABLISHED_MS,
                    (_, _, false) => OPENING_MS,
                }
            }
            _ if self.replied => DATAGRAM_REPLIED_MS,
            _ => DATAGRAM_MS,
        };
        self.expires_ms = now_ms + lifetime_ms;
    }
}

impl Sighting<'_> {
    /// Guest's and remote's address.
    fn ends(&self) -> (IpAddr, IpAddr) {
        match self.direction {
            Direction::Egress => (self.packet.source, self.packet.destination),
            Direction::Ingress => (self.packet.destination, self.packet.source),
        }
    }

    fn key(&self, kind: Kind, protocol: u8, guest_port: u16, remote_port: u16) -> Key {
        let (guest, remote) = self.ends();
        let mac = self.port.mac;
        Key { vni: self.vni, mac, kind, protocol, guest, remote, guest_port, remote_port }
    }

    /// The connection the packet belongs to, or `None` where its protocol has none: such packets
    /// pass by the rules alone, as do packets to groups, which nobody answers as such.
    fn connection(&self) -> Option<Key> {
        let (source, destination) = match self.packet.transport {
            Transport::Tcp { source, destination, .. } => (source, destination),
            Transport::Udp { source, destination } => (source, destination),
            Transport::Icmp { kind: 8 | 0, ident, .. } if self.packet.protocol == wire::ICMP => {
                (ident, ident)
            }
            Transport::Icmp { kind: 128 | 129, ident, .. }
                if self.packet.protocol == wire::ICMPV6 =>
            {
                (ident, ident)
            }
            Transport::Other => (0, 0),
            Transport::Icmp { .. } | Transport::LaterFragment { .. } => return None,
        };
        if is_group_address(self.packet.destination) {
            return None;
        }
        Some(match self.direction {
            Direction::Egress => {
                self.key(Kind::Connection, self.packet.protocol, source, destination)
            }
            Direction::Ingress => {
                self.key(Kind::Connection, self.packet.protocol, destination, source)
            }
        })
    }

    fn fragments(&self, ident: u32) -> Key {
        let kind = Kind::Fragments(self.direction);
        self.key(kind, self.packet.protocol, (ident >> 16) as u16, ident as u16)
    }

    /// The connection that an ICMP error is about, if it is one.
    fn quoted(&self) -> Option<Key> {
        let Transport::Icmp { kind, .. } = self.packet.transport else { return None };
        let is_error = match self.packet.ethertype {
            Ethertype::Ipv4 => matches!(kind, 3 | 11 | 12),
            Ethertype::Ipv6 => matches!(kind, 1..=4),
        };
        if !is_error {
            return None;
        }
        let quoted = wire::parse_quoted(self.bytes, self.packet)?;
        let echo = matches!(quoted.protocol, wire::ICMP | wire::ICMPV6);
        let (source_port, destination_port) =
            (quoted.source_port, if echo { quoted.source_port } else { quoted.destination_port });
        // An error travels against the packet it quotes.
        let (guest, remote, guest_port, remote_port) = match self.direction {
            Direction::Ingress => {
                (quoted.source, quoted.destination, source_port, destination_port)
            }
            Direction::Egress => (quoted.destination, quoted.source, destination_port, source_port),
        };
        let (vni, mac, kind) = (self.vni, self.port.mac, Kind::Connection);
        Some(Key {
            vni,
            mac,
            kind,
            protocol: quoted.protocol,
            guest,
            remote,
            guest_port,
            remote_port,
        })
    }

    fn opening(&self) -> Opening {
        let target = match self.packet.transport {
            Transport::Tcp { destination, .. } | Transport::Udp { destination, .. } => {
                Some(Target::Port(destination))
            }
            Transport::Icmp { kind, code, .. } => Some(Target::Icmp { kind, code }),
            Transport::Other | Transport::LaterFragment { .. } => None,
        };
        Opening {
            direction: self.direction,
            ethertype: self.packet.ethertype,
            protocol: self.packet.protocol,
            target,
            remote: self.ends().1,
        }
    }
}

fn is_group_address(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_multicast() || address.is_broadcast(),
        IpAddr::V6(address) => address.is_multicast(),
    }
}
