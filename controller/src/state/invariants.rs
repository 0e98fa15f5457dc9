//! What must hold of the state after every command. Tests and simulation check it each
//! time; it walks everything, so production doesn't.

use imbl::{OrdMap, OrdSet};

use super::compute::Placed;
use super::network::AddressOwner;
use super::volume::{AttachmentState, Homed, VolumeStatus};
use super::{QuotaResource, State};
use crate::ids::{HostId, ProjectId};

impl State {
    /// Checks every invariant.
    ///
    /// # Errors
    /// The first that doesn't hold, in words.
    pub fn check_invariants(&self) -> Result<(), String> {
        self.check_placed()?;
        self.check_volumes()?;
        self.check_ports()?;
        self.check_addresses()?;
        self.check_usage()?;
        if let Some(over) = self.sizes().into_iter().find(|size| size.len > size.max) {
            return Err(format!("there are {} {}, over {}", over.len, over.name, over.max));
        }
        self.check_hosts()?;
        self.index.check(self)?;
        let beyond = |id: &HostId| id.0 >= self.cluster.next_host_id;
        match self.cluster.hosts.keys().find(|id| beyond(id)) {
            Some(id) => Err(format!("host {id} has an id that wasn't given out")),
            None => Ok(()),
        }
    }

    fn check_hosts(&self) -> Result<(), String> {
        for host in self.cluster.hosts.values() {
            if host.fenced.is_some_and(|epoch| epoch != host.fence_epoch) {
                return Err(format!(
                    "host {} is fenced with an epoch that isn't its last",
                    host.id
                ));
            }
        }
        let known = |host: &HostId| self.cluster.hosts.contains_key(host);
        for image in self.image.images.values() {
            if let Some(stray) = image.hosts.iter().find(|host| !known(host)) {
                return Err(format!("image {} is on host {stray}, which isn't there", image.id));
            }
        }
        match self.volume.homed.keys().find(|host| !known(host)) {
            Some(host) => Err(format!("volumes are at home on host {host}, which isn't there")),
            None => Ok(()),
        }
    }

    fn check_placed(&self) -> Result<(), String> {
        let mut placed: OrdMap<HostId, Placed> = OrdMap::new();
        for server in self.compute.servers.values() {
            let Some(host) = server.host else { continue };
            let on = placed.entry(host).or_default();
            on.servers.insert(server.id.clone());
            on.vcpus += u64::from(server.flavor.vcpus);
            on.ram_mib += server.flavor.ram_mib;
            on.disk_gib += server.flavor.disk_gib();
        }
        same("placed", &placed, &self.compute.placed)?;
        if let Some(host) = placed.keys().find(|host| !self.cluster.hosts.contains_key(*host)) {
            return Err(format!("servers are placed on host {host}, which isn't there"));
        }
        for group in self.compute.groups.values() {
            let of = |id| self.compute.servers.get(id).and_then(|s| s.group_id.as_ref());
            if let Some(stray) = group.members.iter().find(|id| of(*id) != Some(&group.id)) {
                return Err(format!("server {stray} isn't of group {}", group.id));
            }
        }
        Ok(())
    }

    fn check_volumes(&self) -> Result<(), String> {
        let mut homed: OrdMap<HostId, Homed> = OrdMap::new();
        let mut by_server: OrdMap<_, OrdSet<_>> = OrdMap::new();
        for volume in self.volume.volumes.values() {
            if let Some(home) = volume.home {
                let at = homed.entry(home).or_default();
                at.volumes.insert(volume.id.clone());
                at.size_gib += volume.size_gib;
            }
            if volume.attachments.len() > 1 {
                return Err(format!("volume {} has two writers", volume.id));
            }
            for attachment in &volume.attachments {
                by_server
                    .entry(attachment.server_id.clone())
                    .or_default()
                    .insert(volume.id.clone());
                let server = self.compute.servers.get(&attachment.server_id);
                if server.is_some_and(|server| server.host != attachment.host) {
                    return Err(format!("volume {} is attached on another host", volume.id));
                }
                if server.is_none() {
                    return Err(format!(
                        "volume {} is attached to a server that is gone",
                        volume.id
                    ));
                }
                if attachment.generation != volume.generation {
                    return Err(format!("volume {} has an old attachment", volume.id));
                }
            }
            let expected = match volume.attachments.first().map(|attachment| attachment.state) {
                Some(AttachmentState::Attaching) => volume.status == VolumeStatus::Attaching,
                Some(AttachmentState::Attached) => volume.status == VolumeStatus::InUse,
                Some(AttachmentState::Detaching) => volume.status == VolumeStatus::Detaching,
                None => !matches!(
                    volume.status,
                    VolumeStatus::Attaching | VolumeStatus::InUse | VolumeStatus::Detaching
                ),
            };
            if !expected {
                return Err(format!("volume {} is {:?}", volume.id, volume.status));
            }
        }
        same("homed", &homed, &self.volume.homed)?;
        same("by_server", &by_server, &self.volume.by_server)
    }

    fn check_ports(&self) -> Result<(), String> {
        let mut macs: OrdMap<_, OrdMap<_, _>> = OrdMap::new();
        let mut group_ports: OrdMap<_, OrdSet<_>> = OrdMap::new();
        for port in self.network.ports.values() {
            let of_network = macs.entry(port.network_id.clone()).or_default();
            if of_network.insert(port.mac_address.clone(), port.id.clone()).is_some() {
                return Err(format!("MAC {} is twice in its network", port.mac_address));
            }
            for group in &port.security_groups {
                group_ports.entry(group.clone()).or_default().insert(port.id.clone());
                if !self.network.security_groups.contains_key(group) {
                    return Err(format!("port {} is in a group that is gone", port.id));
                }
            }
            if !self.network.networks.contains_key(&port.network_id) {
                return Err(format!("port {} is in a network that is gone", port.id));
            }
            if let Some(server) = &port.server_id
                && !self.compute.servers.get(server).is_some_and(|server| {
                    server.host == port.host && server.ports.iter().any(|p| p.port_id == port.id)
                })
            {
                return Err(format!("port {} is bound to a server that hasn't it", port.id));
            }
        }
        same("macs", &macs, &self.network.macs)?;
        same("group_ports", &group_ports, &self.network.group_ports)?;
        let vnis: OrdMap<_, _> = self
            .network
            .networks
            .values()
            .filter_map(|network| Some((network.vni?, network.id.clone())))
            .collect();
        same("vnis", &vnis, &self.network.vnis)
    }

    fn check_addresses(&self) -> Result<(), String> {
        let mut addresses: OrdMap<_, OrdMap<_, _>> = OrdMap::new();
        let ports = self.network.ports.values().flat_map(|port| {
            let owner = AddressOwner::Port(port.id.clone());
            port.fixed_ips.iter().map(move |f| (f.subnet_id.clone(), f.ip_address, owner.clone()))
        });
        let floating = self.network.floating_ips.values().map(|floating| {
            let owner = AddressOwner::FloatingIp(floating.id.clone());
            (floating.subnet_id.clone(), floating.floating_ip_address, owner)
        });
        for (subnet, address, owner) in ports.chain(floating) {
            let Some(known) = self.network.subnets.get(&subnet) else {
                return Err(format!("{address} is of subnet {subnet}, which is gone"));
            };
            if !known.cidr.contains(&address) || known.gateway_ip == Some(address) {
                return Err(format!("{address} isn't one of subnet {subnet}"));
            }
            if addresses.entry(subnet).or_default().insert(address, owner).is_some() {
                return Err(format!("{address} was given out twice"));
            }
        }
        same("addresses", &addresses, &self.network.addresses)
    }

    fn check_usage(&self) -> Result<(), String> {
        use QuotaResource as Q;
        let mut usage: OrdMap<(ProjectId, Q), u64> = OrdMap::new();
        let mut count = |project: &ProjectId, resource: Q, more: u64| {
            if more > 0 {
                *usage.entry((project.clone(), resource)).or_insert(0) += more;
            }
        };
        for server in self.compute.servers.values() {
            count(&server.project_id, Q::Instances, 1);
            count(&server.project_id, Q::Cores, server.flavor.vcpus.into());
            count(&server.project_id, Q::Ram, server.flavor.ram_mib);
        }
        for group in self.compute.groups.values() {
            count(&group.project_id, Q::ServerGroups, 1);
        }
        for volume in self.volume.volumes.values() {
            count(&volume.project_id, Q::Volumes, 1);
            count(&volume.project_id, Q::Gigabytes, volume.size_gib);
        }
        for network in self.network.networks.values() {
            count(&network.project_id, Q::Networks, 1);
        }
        for subnet in self.network.subnets.values() {
            count(&subnet.project_id, Q::Subnets, 1);
        }
        for port in self.network.ports.values() {
            count(&port.project_id, Q::Ports, 1);
        }
        for group in self.network.security_groups.values() {
            count(&group.project_id, Q::SecurityGroups, 1);
            count(&group.project_id, Q::SecurityGroupRules, group.rules.len() as u64);
        }
        for floating in self.network.floating_ips.values() {
            count(&floating.project_id, Q::FloatingIps, 1);
        }
        same("quota usage", &usage, &self.quota.usage)
    }
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: &T, kept: &T) -> Result<(), String> {
    if found == kept { Ok(()) } else { Err(format!("{what} should be {found:?}, is {kept:?}")) }
}
