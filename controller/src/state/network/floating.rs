//! Changes of floating IPs and the ports they forward.

use std::net::IpAddr;

use imbl::OrdMap;

use super::addresses::DONE;
use super::{
    AddressOwner, FixedIpRequest, FloatingIp, NetworkCommand, NewFloatingIp, NewPortForwarding,
    Port, PortForwarding,
};
use crate::ids::{FloatingIpId, PortForwardingId, PortId, ProjectId, SubnetId};
use crate::state::identity::set;
use crate::state::limits::{FLOATING_IPS_MAX, PORT_FORWARDINGS_MAX, room};
use crate::state::outcome::{Outcome, Rejection};
use crate::state::{QuotaResource, State};

impl State {
    fn floating_mut(&mut self, id: &FloatingIpId) -> Result<&mut FloatingIp, Rejection> {
        let floating = self.network.floating_ips.get_mut(id);
        floating.ok_or_else(|| Rejection::not_found("floating IP", id))
    }

    pub(super) fn create_floating_ip(&mut self, new: &NewFloatingIp) -> Result<Outcome, Rejection> {
        room(self.network.floating_ips.len(), FLOATING_IPS_MAX, "floating IP")?;
        if self.network.floating_ips.contains_key(&new.id) {
            let message = format!("Floating IP {} already exists.", new.id);
            return Err(Rejection::conflict("floating IP", &new.id, message));
        }
        let network = self.network_of(&new.floating_network_id)?;
        if !network.external {
            let message = format!("Network {} is not a valid external network.", network.id);
            return Err(Rejection::invalid("floating IP", &new.id, message));
        }
        self.quota.check(&new.project_id, QuotaResource::FloatingIps, 1)?;
        let asked = new.subnet_id.is_some() || new.floating_ip_address.is_some();
        let request = FixedIpRequest {
            subnet_id: new.subnet_id.clone(),
            ip_address: new.floating_ip_address,
        };
        let wanted = asked.then(|| vec![request]);
        let picked = self.pick_addresses(&new.floating_network_id, wanted.as_deref(), &[])?;
        let Some(address) = picked.into_iter().next() else {
            let message = "The external network has no subnet.";
            return Err(Rejection::invalid("floating IP", &new.id, message));
        };
        let target = match &new.port_id {
            None => None,
            Some(port) => {
                Some(self.floating_target(&new.id, &new.project_id, port, new.fixed_ip_address)?)
            }
        };
        let floating = FloatingIp {
            id: new.id.clone(),
            project_id: new.project_id.clone(),
            description: new.description.clone(),
            floating_network_id: new.floating_network_id.clone(),
            subnet_id: address.subnet_id.clone(),
            floating_ip_address: address.ip_address,
            port_id: new.port_id.clone(),
            fixed_ip_address: target,
            port_forwardings: OrdMap::new(),
            tags: new.tags.clone(),
            revision_number: 0,
            created_ms: self.time_ms,
            updated_ms: self.time_ms,
        };
        self.quota.charge(&floating.project_id, QuotaResource::FloatingIps, 1);
        let owner = AddressOwner::FloatingIp(floating.id.clone());
        self.take_address(&address.subnet_id, address.ip_address, owner);
        self.index.add_floating(&floating);
        self.network.floating_ips.insert(floating.id.clone(), floating.clone());
        Ok(Outcome::FloatingIp(Box::new(floating)))
    }

    /// The address of a port that a floating IP of this project can stand for.
    fn floating_target(
        &self,
        id: &FloatingIpId,
        project: &ProjectId,
        port: &PortId,
        wanted: Option<IpAddr>,
    ) -> Result<IpAddr, Rejection> {
        let port = self.port_of(project, port)?;
        let address = address_of(port, wanted)?;
        let ids = self.index.floating_by_port.get(&port.id).into_iter().flatten();
        let mut others = ids.filter_map(|id| self.network.floating_ips.get(id));
        let taken = others.find(|known| {
            known.id != *id
                && known.port_id.as_ref() == Some(&port.id)
                && known.fixed_ip_address == Some(address)
        });
        match taken {
            None => Ok(address),
            Some(known) => {
                let message = format!(
                    "Cannot associate floating IP with port {} using fixed IP {address}, as that fixed IP already has a floating IP ({}) on the external network.",
                    port.id, known.floating_ip_address
                );
                Err(Rejection::conflict("floating IP", id, message))
            }
        }
    }

    fn port_of(&self, project: &ProjectId, port: &PortId) -> Result<&Port, Rejection> {
        let known = self.network.ports.get(port);
        let known = known.filter(|known| known.project_id == *project);
        known.map(AsRef::as_ref).ok_or_else(|| Rejection::not_found("port", port))
    }

    pub(super) fn update_floating_ip(
        &mut self,
        command: &NetworkCommand,
    ) -> Result<Outcome, Rejection> {
        let NetworkCommand::UpdateFloatingIp { id, port_id, fixed_ip_address, description, tags } =
            command
        else {
            return Ok(Outcome::Ignored);
        };
        let known = self.floating_mut(id)?.clone();
        let target = match port_id {
            Some(Some(port)) => {
                if !known.port_forwardings.is_empty() {
                    let message = format!(
                        "Cannot associate floating IP {} with port {port}: it has port forwardings.",
                        known.floating_ip_address
                    );
                    return Err(Rejection::in_use("floating IP", id, message));
                }
                Some(self.floating_target(id, &known.project_id, port, *fixed_ip_address)?)
            }
            Some(None) => None,
            None => known.fixed_ip_address,
        };
        let now = self.time_ms;
        let floating = self.floating_mut(id)?;
        set(&mut floating.port_id, port_id);
        floating.fixed_ip_address = target;
        set(&mut floating.description, description);
        set(&mut floating.tags, tags);
        floating.revision_number += 1;
        floating.updated_ms = now;
        let floating = floating.clone();
        self.index.remove_floating(&known);
        self.index.add_floating(&floating);
        Ok(Outcome::FloatingIp(Box::new(floating)))
    }

    pub(super) fn delete_floating_ip(&mut self, id: &FloatingIpId) -> Result<Outcome, Rejection> {
        let floating = self.floating_mut(id)?.clone();
        self.network.floating_ips.remove(id);
        self.index.remove_floating(&floating);
        self.free_address(&floating.subnet_id, floating.floating_ip_address);
        self.quota.release(&floating.project_id, QuotaResource::FloatingIps, 1);
        DONE
    }

    /// Gives an address back to its subnet.
    pub(super) fn free_address(&mut self, subnet: &SubnetId, address: IpAddr) {
        self.index.free_address(subnet, address);
        if let Some(taken) = self.network.addresses.get_mut(subnet) {
            taken.remove(&address);
            if taken.is_empty() {
                self.network.addresses.remove(subnet);
            }
        }
    }

    pub(super) fn create_port_forwarding(
        &mut self,
        new: &NewPortForwarding,
    ) -> Result<Outcome, Rejection> {
        let invalid = |message: &str| Rejection::invalid("port forwarding", &new.id, message);
        let floating = self.floating_mut(&new.floating_ip_id)?.clone();
        room(floating.port_forwardings.len(), PORT_FORWARDINGS_MAX, "port forwarding")?;
        if new.protocol != "tcp" {
            return Err(invalid("Only TCP can be forwarded."));
        }
        if new.external_port == 0 || new.internal_port == 0 {
            return Err(invalid("A port must be 1 to 65535."));
        }
        if floating.port_id.is_some() {
            let message = format!(
                "Floating IP {} is associated with a port and can't forward single ones.",
                floating.floating_ip_address
            );
            return Err(Rejection::in_use("floating IP", &floating.id, message));
        }
        if floating.port_forwardings.values().any(|f| f.external_port == new.external_port) {
            let message = format!(
                "A duplicate port forwarding entry with same attributes already exists, conflicting values are {{'floatingip_id': '{}', 'external_port': {}, 'protocol': 'tcp'}}",
                floating.id, new.external_port
            );
            return Err(Rejection::conflict("port forwarding", &new.id, message));
        }
        let port = self.port_of(&floating.project_id, &new.internal_port_id)?;
        let forwarding = PortForwarding {
            id: new.id.clone(),
            protocol: new.protocol.clone(),
            external_port: new.external_port,
            internal_port_id: port.id.clone(),
            internal_ip_address: address_of(port, new.internal_ip_address)?,
            internal_port: new.internal_port,
            description: new.description.clone(),
        };
        let floating = self.floating_mut(&new.floating_ip_id)?;
        floating.port_forwardings.insert(forwarding.id.clone(), forwarding.clone());
        floating.revision_number += 1;
        let floating = floating.clone();
        self.index.add_floating(&floating);
        Ok(Outcome::PortForwarding(Box::new(forwarding)))
    }

    pub(super) fn delete_port_forwarding(
        &mut self,
        floating: &FloatingIpId,
        id: &PortForwardingId,
    ) -> Result<Outcome, Rejection> {
        let known = self.floating_mut(floating)?.clone();
        let floating = self.floating_mut(floating)?;
        if floating.port_forwardings.remove(id).is_none() {
            return Err(Rejection::not_found("port forwarding", id));
        }
        floating.revision_number += 1;
        let floating = floating.clone();
        self.index.remove_floating(&known);
        self.index.add_floating(&floating);
        DONE
    }

    /// Frees every floating IP that led to a port which is gone.
    pub(super) fn free_floating_ips_of(&mut self, port: &PortId) {
        self.free_floating_ips(port, |_| false);
    }

    /// Frees every floating IP that led to an address which the port no longer has.
    pub(super) fn drop_dangling_floating_ips(&mut self, port: &Port) {
        let kept: Vec<IpAddr> = port.fixed_ips.iter().map(|fixed| fixed.ip_address).collect();
        self.free_floating_ips(&port.id, |address| kept.contains(&address));
    }

    fn free_floating_ips(&mut self, port: &PortId, keeps: impl Fn(IpAddr) -> bool) {
        let dangles = |id: &PortId, address: IpAddr| id == port && !keeps(address);
        let ids = self.index.floating_by_port.get(port).into_iter().flatten();
        let touched: Vec<FloatingIpId> = ids
            .filter_map(|id| self.network.floating_ips.get(id))
            .filter(|floating| {
                let whole = floating.port_id.as_ref().zip(floating.fixed_ip_address);
                whole.is_some_and(|(id, address)| dangles(id, address))
                    || floating
                        .port_forwardings
                        .values()
                        .any(|f| dangles(&f.internal_port_id, f.internal_ip_address))
            })
            .map(|floating| floating.id.clone())
            .collect();
        for id in touched {
            let Some(floating) = self.network.floating_ips.get_mut(&id) else { continue };
            self.index.remove_floating(floating);
            let whole = floating.port_id.as_ref().zip(floating.fixed_ip_address);
            if whole.is_some_and(|(id, address)| dangles(id, address)) {
                floating.port_id = None;
                floating.fixed_ip_address = None;
            }
            floating.port_forwardings = floating
                .port_forwardings
                .iter()
                .filter(|(_, f)| !dangles(&f.internal_port_id, f.internal_ip_address))
                .map(|(id, forwarding)| (id.clone(), forwarding.clone()))
                .collect();
            floating.revision_number += 1;
            self.index.add_floating(floating);
        }
    }
}

/// The wanted address of a port, or its first.
fn address_of(port: &Port, wanted: Option<IpAddr>) -> Result<IpAddr, Rejection> {
    let mut addresses = port.fixed_ips.iter().map(|fixed| fixed.ip_address);
    match wanted {
        None => addresses.find(IpAddr::is_ipv4).ok_or_else(|| {
            let message = format!("Port {} has no IPv4 address.", port.id);
            Rejection::invalid("port", &port.id, message)
        }),
        Some(wanted) => addresses.find(|address| *address == wanted).ok_or_else(|| {
            let message = format!("Port {} does not have fixed ip {wanted}.", port.id);
            Rejection::invalid("port", &port.id, message)
        }),
    }
}
