//! Addresses and MACs: which are free, which belong to a subnet. Deterministic: the lowest
//! free address of the pools, a MAC that follows from the port's id.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use sha2::{Digest, Sha256};

use super::{AllocationPool, FixedIp, FixedIpRequest, Subnet};
use crate::ids::{NetworkId, PortId, SubnetId};
use crate::state::State;
use crate::state::limits::PORT_ADDRESSES_MAX;
use crate::state::outcome::{Outcome, Rejection, RejectionKind};

impl From<IpAddr> for FixedIpRequest {
    fn from(address: IpAddr) -> Self {
        Self { subnet_id: None, ip_address: Some(address) }
    }
}

/// The address after this one.
pub(in crate::state) fn next(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(v4) => Some(IpAddr::V4(Ipv4Addr::from(u32::from(v4).checked_add(1)?))),
        IpAddr::V6(v6) => Some(IpAddr::V6(Ipv6Addr::from(u128::from(v6).checked_add(1)?))),
    }
}

/// The address before this one.
fn previous(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(v4) => Some(IpAddr::V4(Ipv4Addr::from(u32::from(v4).checked_sub(1)?))),
        IpAddr::V6(v6) => Some(IpAddr::V6(Ipv6Addr::from(u128::from(v6).checked_sub(1)?))),
    }
}

/// The first and the last address that a guest can have in a range.
pub(super) fn usable(cidr: IpNet) -> AllocationPool {
    let (first, last) = (cidr.network(), cidr.broadcast());
    if cidr.max_prefix_len() - cidr.prefix_len() < 2 {
        return AllocationPool { start: first, end: last };
    }
    AllocationPool { start: next(first).unwrap_or(first), end: previous(last).unwrap_or(last) }
}

/// Everything usable but the gateway.
pub(super) fn default_pools(cidr: IpNet, gateway: Option<IpAddr>) -> Vec<AllocationPool> {
    let all = usable(cidr);
    let Some(gateway) = gateway.filter(|gateway| (all.start..=all.end).contains(gateway)) else {
        return vec![all];
    };
    let below = previous(gateway).filter(|end| *end >= all.start && gateway > all.start);
    let above = next(gateway).filter(|start| *start <= all.end);
    let below = below.map(|end| AllocationPool { start: all.start, end });
    let above = above.map(|start| AllocationPool { start, end: all.end });
    below.into_iter().chain(above).collect()
}

/// The MAC that a port gets: the `attempt`-th that follows from its id.
fn derived_mac(port: &PortId, attempt: u32) -> String {
    let digest = Sha256::digest(format!("{port}/{attempt}").as_bytes());
    format!("fa:16:3e:{:02x}:{:02x}:{:02x}", digest[0], digest[1], digest[2])
}

/// A MAC in lower case with colons, if it is one that a port can have.
pub fn parse_mac(text: &str) -> Option<String> {
    let lower = text.to_ascii_lowercase().replace('-', ":");
    let octets: Vec<&str> = lower.split(':').collect();
    let hex = |octet: &&str| octet.len() == 2 && octet.bytes().all(|b| b.is_ascii_hexdigit());
    if octets.len() != 6 || !octets.iter().all(hex) {
        return None;
    }
    let first = u8::from_str_radix(octets[0], 16).ok()?;
    // A multicast address is nobody's own, and all zeros is no address.
    (first & 1 == 0 && lower != "00:00:00:00:00:00").then_some(lower)
}

impl State {
    /// The MAC of a new port: the wanted one if it is free, else one derived from its id.
    pub(super) fn pick_mac(
        &self,
        network: &NetworkId,
        port: &PortId,
        wanted: Option<&str>,
    ) -> Result<String, Rejection> {
        let taken =
            |mac: &str| self.network.macs.get(network).is_some_and(|macs| macs.contains_key(mac));
        let Some(wanted) = wanted else {
            // 2^24 MACs and far fewer ports in a network: some attempt is free.
            return Ok((0..)
                .map(|n| derived_mac(port, n))
                .find(|mac| !taken(mac))
                .unwrap_or_default());
        };
        let mac = parse_mac(wanted).ok_or_else(|| {
            Rejection::invalid("port", port, format!("'{wanted}' is not a valid MAC address."))
        })?;
        if taken(&mac) {
            let message = format!(
                "Unable to complete operation for network {network}. The mac address {mac} is in use."
            );
            return Err(Rejection::conflict("port", port, message));
        }
        Ok(mac)
    }

    /// The subnets of a network, in the order of their ids.
    pub fn subnets_of<'a>(&'a self, network: &NetworkId) -> impl Iterator<Item = &'a Subnet> {
        let ids = self.index.subnets.get(network).into_iter().flatten();
        ids.filter_map(|id| self.network.subnets.get(id))
    }

    /// The addresses that a port gets; nothing is taken yet. Addresses in `own` are the
    /// port's already.
    pub(super) fn pick_addresses(
        &self,
        network: &NetworkId,
        wanted: Option<&[FixedIpRequest]>,
        own: &[FixedIp],
    ) -> Result<Vec<FixedIp>, Rejection> {
        let Some(wanted) = wanted else {
            return self.pick_any(network).map(|picked| picked.into_iter().collect());
        };
        if wanted.len() > PORT_ADDRESSES_MAX {
            let message = format!("A port can have {PORT_ADDRESSES_MAX} addresses at most.");
            return Err(Rejection::invalid("port", network, message));
        }
        let mut picked: Vec<FixedIp> = Vec::new();
        for request in wanted {
            let address = self.pick_one(network, request, own, &picked)?;
            picked.push(address);
        }
        Ok(picked)
    }

    /// One address of the first subnet that has one; none where there is no subnet.
    fn pick_any(&self, network: &NetworkId) -> Result<Option<FixedIp>, Rejection> {
        let mut subnets = self.subnets_of(network).peekable();
        if subnets.peek().is_none() {
            return Ok(None);
        }
        subnets.find_map(|subnet| self.lowest_free(subnet, &[])).map(Some).ok_or_else(|| {
            let message = format!("No more IP addresses available on network {network}.");
            Rejection::new(RejectionKind::AddressesExhausted, "network", network, message)
        })
    }

    fn pick_one(
        &self,
        network: &NetworkId,
        request: &FixedIpRequest,
        own: &[FixedIp],
        picked: &[FixedIp],
    ) -> Result<FixedIp, Rejection> {
        let subnet = self.subnet_for(network, request)?;
        let Some(address) = request.ip_address else {
            return self.lowest_free(subnet, picked).ok_or_else(|| {
                let message = format!("No more IP addresses available on subnet {}.", subnet.id);
                Rejection::new(RejectionKind::AddressesExhausted, "subnet", &subnet.id, message)
            });
        };
        let fixed = FixedIp { subnet_id: subnet.id.clone(), ip_address: address };
        let free = self.address_owner(&subnet.id, address).is_none() || own.contains(&fixed);
        if !free || picked.contains(&fixed) || subnet.gateway_ip == Some(address) {
            let message = format!("IP address {address} already allocated in subnet {}", subnet.id);
            return Err(Rejection::conflict("ip address", address, message));
        }
        Ok(fixed)
    }

    fn subnet_for(
        &self,
        network: &NetworkId,
        request: &FixedIpRequest,
    ) -> Result<&Subnet, Rejection> {
        let invalid = |message: String| Rejection::invalid("ip address", network, message);
        if let Some(id) = &request.subnet_id {
            let subnet = self.network.subnets.get(id);
            let subnet = subnet.ok_or_else(|| Rejection::not_found("subnet", id))?;
            if subnet.network_id != *network {
                return Err(invalid(format!("Subnet {id} is not on network {network}.")));
            }
            return match request.ip_address {
                Some(address) if !holds(subnet, address) => Err(invalid(format!(
                    "IP address {address} is not a valid IP for the specified subnet."
                ))),
                _ => Ok(subnet),
            };
        }
        let Some(address) = request.ip_address else {
            return Err(invalid("A fixed IP needs a subnet or an address.".into()));
        };
        self.subnets_of(network).find(|subnet| holds(subnet, address)).ok_or_else(|| {
            invalid(format!(
                "IP address {address} is not a valid IP for any of the subnets on the specified network."
            ))
        })
    }

    /// To what an address belongs.
    pub fn address_owner(
        &self,
        subnet: &SubnetId,
        address: IpAddr,
    ) -> Option<&super::AddressOwner> {
        self.network.addresses.get(subnet)?.get(&address)
    }

    /// The lowest address of a subnet's pools that is free and not among those just picked.
    pub(in crate::state) fn lowest_free(
        &self,
        subnet: &Subnet,
        picked: &[FixedIp],
    ) -> Option<FixedIp> {
        let Some(pools) = self.index.free_in(&subnet.id) else {
            return self.lowest_free_by_walking(subnet, picked);
        };
        let taken = self.network.addresses.get(&subnet.id);
        let free = |address: &IpAddr| {
            subnet.gateway_ip != Some(*address)
                && !taken.is_some_and(|taken| taken.contains_key(address))
                && !picked.iter().any(|p| p.subnet_id == subnet.id && p.ip_address == *address)
        };
        let ip_address = pools.iter().find_map(|pool| pool.first(free))?;
        Some(FixedIp { subnet_id: subnet.id.clone(), ip_address })
    }

    /// An address belongs to something now.
    pub(super) fn take_address(
        &mut self,
        subnet: &SubnetId,
        address: IpAddr,
        owner: super::AddressOwner,
    ) {
        let taken = self.network.addresses.entry(subnet.clone()).or_default();
        taken.insert(address, owner);
        if let Some(subnet) = self.network.subnets.get(subnet) {
            self.index.take_address(subnet, address, &|address| taken.contains_key(&address));
        }
    }

    /// The same without the index.
    pub(in crate::state) fn lowest_free_by_walking(
        &self,
        subnet: &Subnet,
        picked: &[FixedIp],
    ) -> Option<FixedIp> {
        let taken = self.network.addresses.get(&subnet.id);
        let free = subnet.allocation_pools.iter().find_map(|pool| {
            let mut candidate = Some(pool.start);
            let used = taken.into_iter().flat_map(|t| t.range(pool.start..=pool.end));
            let mut used = used.map(|(address, _)| *address).peekable();
            while let Some(address) = candidate.filter(|address| *address <= pool.end) {
                let is_used = used.next_if_eq(&address).is_some();
                let is_picked =
                    picked.iter().any(|p| p.subnet_id == subnet.id && p.ip_address == address);
                if !is_used && !is_picked && subnet.gateway_ip != Some(address) {
                    return Some(address);
                }
                candidate = next(address);
            }
            None
        })?;
        Some(FixedIp { subnet_id: subnet.id.clone(), ip_address: free })
    }
}

/// True for an address that a guest can have in the subnet.
fn holds(subnet: &Subnet, address: IpAddr) -> bool {
    let range = usable(subnet.cidr);
    (range.start..=range.end).contains(&address)
}

/// The outcome that shows nothing, by its usual name.
pub(super) const DONE: Result<Outcome, Rejection> = Ok(Outcome::Done);

#[cfg(test)]
mod tests {
    use super::*;

    fn pools(cidr: &str, gateway: &str) -> Vec<(String, String)> {
        let gateway = (!gateway.is_empty()).then(|| gateway.parse().expect("an address"));
        default_pools(cidr.parse().expect("a range"), gateway)
            .iter()
            .map(|pool| (pool.start.to_string(), pool.end.to_string()))
            .collect()
    }

    #[test]
    fn pools_leave_out_the_gateway_and_the_ends() {
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(pools("10.0.0.0/24", "10.0.0.1"), [pair("10.0.0.2", "10.0.0.254")]);
        assert_eq!(pools("10.0.0.0/24", "10.0.0.254"), [pair("10.0.0.1", "10.0.0.253")]);
        assert_eq!(
            pools("10.0.0.0/29", "10.0.0.3"),
            [pair("10.0.0.1", "10.0.0.2"), pair("10.0.0.4", "10.0.0.6")]
        );
        assert_eq!(pools("10.0.0.0/30", ""), [pair("10.0.0.1", "10.0.0.2")]);
    }

    #[test]
    fn macs_are_checked() {
        assert_eq!(parse_mac("FA-16-3E-00-00-01").as_deref(), Some("fa:16:3e:00:00:01"));
        assert_eq!(parse_mac("01:00:5e:00:00:01"), None);
        assert_eq!(parse_mac("00:00:00:00:00:00"), None);
        assert_eq!(parse_mac("fa:16:3e:00:00"), None);
    }
}
