//! Changes of ports.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::addresses::DONE;
use super::{AddressOwner, NewPort, Port, PortStatus, PortUpdate};
use crate::ids::{HostId, PortId, SecurityGroupId, ServerId};
use crate::state::compute::{DEVICE_OWNER, NewServer};
use crate::state::identity::set;
use crate::state::limits::{ADDRESS_PAIRS_MAX, PORTS_MAX, room};
use crate::state::outcome::{Outcome, Rejection};
use crate::state::{QuotaResource, State};

impl State {
    fn port_mut(&mut self, id: &PortId) -> Result<&mut Port, Rejection> {
        let port = self.network.ports.get_mut(id);
        port.map(Arc::make_mut).ok_or_else(|| Rejection::not_found("port", id))
    }

    /// Makes a port.
    pub(in crate::state) fn create_port(&mut self, new: &NewPort) -> Result<Outcome, Rejection> {
        room(self.network.ports.len(), PORTS_MAX, "port")?;
        if self.network.ports.contains_key(&new.id) {
            let message = format!("Port {} already exists.", new.id);
            return Err(Rejection::conflict("port", &new.id, message));
        }
        let network = self.network_of(&new.network_id)?;
        if network.external {
            let message = format!(
                "Ports can't be made on the external network {}; take a floating IP from it.",
                network.id
            );
            return Err(Rejection::invalid("port", &new.id, message));
        }
        let port_security_enabled =
            new.port_security_enabled.unwrap_or(network.port_security_enabled);
        self.quota.check(&new.project_id, QuotaResource::Ports, 1)?;
        check_pairs(&new.id, new.allowed_address_pairs.len())?;
        let mac_address = self.pick_mac(&new.network_id, &new.id, new.mac_address.as_deref())?;
        let fixed_ips = self.pick_addresses(&new.network_id, new.fixed_ips.as_deref(), &[])?;
        let security_groups = match &new.security_groups {
            Some(groups) => self.check_groups(groups)?,
            None if port_security_enabled => {
                BTreeSet::from([self.ensure_default_group(&new.project_id)])
            }
            None => BTreeSet::new(),
        };
        let port = Port {
            id: new.id.clone(),
            network_id: new.network_id.clone(),
            project_id: new.project_id.clone(),
            name: new.name.clone(),
            description: new.description.clone(),
            admin_state_up: new.admin_state_up,
            mac_address,
            fixed_ips,
            port_security_enabled,
            security_groups,
            allowed_address_pairs: new.allowed_address_pairs.clone(),
            device_id: new.device_id.clone(),
            device_owner: new.device_owner.clone(),
            server_id: None,
            host: None,
            status: PortStatus::Down,
            tags: new.tags.clone(),
            revision_number: 1,
            created_ms: self.time_ms,
            updated_ms: self.time_ms,
        };
        self.quota.charge(&port.project_id, QuotaResource::Ports, 1);
        self.index_port(&port);
        self.network.ports.insert(port.id.clone(), Arc::new(port.clone()));
        Ok(Outcome::Port(Box::new(port)))
    }

    fn check_groups(
        &self,
        groups: &BTreeSet<SecurityGroupId>,
    ) -> Result<BTreeSet<SecurityGroupId>, Rejection> {
        let missing = groups.iter().find(|id| !self.network.security_groups.contains_key(*id));
        match missing {
            Some(id) => Err(Rejection::not_found("security group", id)),
            None => Ok(groups.clone()),
        }
    }

    /// Enters a port into everything that follows from it.
    fn index_port(&mut self, port: &Port) {
        let macs = self.network.macs.entry(port.network_id.clone()).or_default();
        macs.insert(port.mac_address.clone(), port.id.clone());
        for fixed in &port.fixed_ips {
            let owner = AddressOwner::Port(port.id.clone());
            self.take_address(&fixed.subnet_id, fixed.ip_address, owner);
        }
        for group in &port.security_groups {
            let ports = self.network.group_ports.entry(group.clone()).or_default();
            ports.insert(port.id.clone());
        }
    }

    /// Takes a port out of everything that follows from it.
    fn unindex_port(&mut self, port: &Port) {
        if let Some(macs) = self.network.macs.get_mut(&port.network_id) {
            macs.remove(&port.mac_address);
            if macs.is_empty() {
                self.network.macs.remove(&port.network_id);
            }
        }
        for fixed in &port.fixed_ips {
            self.free_address(&fixed.subnet_id, fixed.ip_address);
        }
        for group in &port.security_groups {
            let Some(ports) = self.network.group_ports.get_mut(group) else { continue };
            ports.remove(&port.id);
            if ports.is_empty() {
                self.network.group_ports.remove(group);
            }
        }
    }

    pub(super) fn update_port(&mut self, update: &PortUpdate) -> Result<Outcome, Rejection> {
        let known = self.network.ports.get(&update.id).cloned();
        let known = known.ok_or_else(|| Rejection::not_found("port", &update.id))?;
        let mut port = Port::clone(&known);
        if let Some(wanted) = &update.fixed_ips {
            port.fixed_ips =
                self.pick_addresses(&port.network_id, Some(wanted), &known.fixed_ips)?;
        }
        if let Some(groups) = &update.security_groups {
            port.security_groups = self.check_groups(groups)?;
        }
        set(&mut port.name, &update.name);
        set(&mut port.description, &update.description);
        set(&mut port.admin_state_up, &update.admin_state_up);
        set(&mut port.port_security_enabled, &update.port_security_enabled);
        set(&mut port.allowed_address_pairs, &update.allowed_address_pairs);
        set(&mut port.tags, &update.tags);
        check_pairs(&port.id, port.allowed_address_pairs.len())?;
        let guarded = !port.security_groups.is_empty() || !port.allowed_address_pairs.is_empty();
        if guarded && !port.port_security_enabled {
            let message = "Port security must be enabled and port must not have an IP address in order to use security groups or address pairs.";
            return Err(Rejection::conflict("port", &port.id, message));
        }
        let renamed = update.device_id.is_some() || update.device_owner.is_some();
        if renamed && port.server_id.is_some() {
            let message = format!("Port {} belongs to server {}.", port.id, port.device_id);
            return Err(Rejection::in_use("port", &port.id, message));
        }
        set(&mut port.device_id, &update.device_id);
        set(&mut port.device_owner, &update.device_owner);
        port.revision_number += 1;
        port.updated_ms = self.time_ms;
        self.unindex_port(&known);
        self.index_port(&port);
        self.drop_dangling_floating_ips(&port);
        self.network.ports.insert(port.id.clone(), Arc::new(port.clone()));
        Ok(Outcome::Port(Box::new(port)))
    }

    pub(super) fn delete_port(&mut self, id: &PortId) -> Result<Outcome, Rejection> {
        let port = self.port_mut(id)?;
        if let Some(server) = &port.server_id {
            let message = format!("Port {id} is in use by server {server}; remove it there.");
            return Err(Rejection::in_use("port", id, message));
        }
        self.remove_port(id);
        DONE
    }

    /// Removes a port, and frees floating IPs that led to it.
    pub(in crate::state) fn remove_port(&mut self, id: &PortId) {
        let Some(port) = self.network.ports.remove(id) else { return };
        self.unindex_port(&port);
        self.free_floating_ips_of(id);
        self.quota.release(&port.project_id, QuotaResource::Ports, 1);
    }

    /// Gives a port to a new server.
    pub(in crate::state) fn bind_port(
        &mut self,
        id: &PortId,
        server: &NewServer,
        host: Option<HostId>,
    ) -> Result<(), Rejection> {
        let now = self.time_ms;
        let port = self.port_mut(id)?;
        if port.project_id != server.project_id {
            return Err(Rejection::not_found("port", id));
        }
        if port.server_id.is_some() || !port.device_id.is_empty() {
            let message = format!("Port {id} is still in use.");
            return Err(Rejection::in_use("port", id, message));
        }
        port.server_id = Some(server.id.clone());
        port.device_id = server.id.to_string();
        port.device_owner = DEVICE_OWNER.into();
        port.host = host;
        port.status = PortStatus::Build;
        port.updated_ms = now;
        Ok(())
    }

    /// Takes a port back from a server that is gone.
    pub(in crate::state) fn unbind_port(&mut self, id: &PortId) {
        let now = self.time_ms;
        let Ok(port) = self.port_mut(id) else { return };
        port.server_id = None;
        port.device_id.clear();
        port.device_owner.clear();
        port.host = None;
        port.status = PortStatus::Down;
        port.revision_number += 1;
        port.updated_ms = now;
    }

    /// Binds a server's ports to another host, or to none.
    pub(in crate::state) fn move_ports(
        &mut self,
        server: &ServerId,
        host: Option<HostId>,
        status: PortStatus,
    ) {
        let now = self.time_ms;
        let Some(server) = self.compute.servers.get(server).cloned() else { return };
        for port in &server.ports {
            let Ok(port) = self.port_mut(&port.port_id) else { continue };
            port.host = host;
            port.status = status;
            port.revision_number += 1;
            port.updated_ms = now;
        }
    }

    /// Shows a server's ports with a status.
    pub(in crate::state) fn show_ports(&mut self, server: &ServerId, status: PortStatus) {
        let Some(server) = self.compute.servers.get(server).cloned() else { return };
        for port in &server.ports {
            if let Ok(port) = self.port_mut(&port.port_id) {
                port.status = status;
            }
        }
    }
}

fn check_pairs(port: &PortId, count: usize) -> Result<(), Rejection> {
    if count <= ADDRESS_PAIRS_MAX {
        return Ok(());
    }
    let message = format!("A port can have {ADDRESS_PAIRS_MAX} allowed address pairs at most.");
    Err(Rejection::invalid("port", port, message))
}
