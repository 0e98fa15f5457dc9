//! Changes of flavors, keypairs, server groups and servers.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{
    ComputeCommand, Desired, Fault, Flavor, GroupPolicy, Keypair, NewServer, Placed, Placement,
    PortSource, PowerState, Server, ServerGroup, ServerPort, TaskState, VmState,
};
use crate::ids::{HostId, ImageId, ServerGroupId, ServerId, UserId};
use crate::state::cluster::Host;
use crate::state::identity::set;
use crate::state::image::{Image, ImageStatus};
use crate::state::limits::{
    FLAVOR_PROJECTS_MAX, FLAVOR_SPECS_MAX, FLAVORS_MAX, KEYPAIRS_MAX, METADATA_MAX,
    SERVER_GROUP_MEMBERS_MAX, SERVER_GROUPS_MAX, SERVER_PORTS_MAX, SERVERS_MAX, TAGS_MAX, room,
};
use crate::state::network::{NewPort, PortStatus};
use crate::state::outcome::{Outcome, Rejection, RejectionKind};
use crate::state::{QuotaResource, State};

/// vCPUs that may be given out for each of a host's, as Nova's `initial_cpu_allocation_ratio`.
pub const CPU_ALLOCATION_RATIO: u64 = 4;

/// `device_owner` of a server's ports.
pub const DEVICE_OWNER: &str = "compute:nova";

impl State {
    pub(in crate::state) fn apply_compute(
        &mut self,
        command: &ComputeCommand,
    ) -> Result<Outcome, Rejection> {
        match command {
            ComputeCommand::CreateFlavor(flavor) => self.create_flavor(flavor),
            ComputeCommand::UpdateFlavor { id, description } => {
                let flavor = self.flavor_mut(id.as_str())?;
                flavor.description.clone_from(description);
                Ok(Outcome::Flavor(Box::new(flavor.clone())))
            }
            ComputeCommand::DeleteFlavor(id) => {
                self.flavor_mut(id.as_str())?;
                self.compute.flavors.remove(id);
                Ok(Outcome::Done)
            }
            ComputeCommand::SetFlavorExtraSpecs { id, set, remove } => {
                let known = self.flavor_mut(id.as_str())?.extra_specs.len();
                self.room_within(known + set.len(), FLAVOR_SPECS_MAX, "extra spec")?;
                let flavor = self.flavor_mut(id.as_str())?;
                if let Some(missing) = remove.iter().find(|k| !flavor.extra_specs.contains_key(*k))
                {
                    let message = format!("Flavor {id} has no extra specs with key {missing}.");
                    return Err(Rejection::new(RejectionKind::NotFound, "flavor", id, message));
                }
                flavor.extra_specs.retain(|key, _| !remove.contains(key));
                flavor.extra_specs.extend(set.clone());
                Ok(Outcome::Flavor(Box::new(flavor.clone())))
            }
            ComputeCommand::SetFlavorAccess { id, project_id, allowed } => {
                let known = self.flavor_mut(id.as_str())?.projects.len();
                let wanted = known + usize::from(*allowed);
                self.room_within(wanted, FLAVOR_PROJECTS_MAX, "flavor access")?;
                let flavor = self.flavor_mut(id.as_str())?;
                if *allowed {
                    if !flavor.projects.insert(project_id.clone()) {
                        let message = format!(
                            "Flavor access already exists for flavor {id} and project {project_id} combination."
                        );
                        return Err(Rejection::conflict("flavor access", id, message));
                    }
                } else if !flavor.projects.remove(project_id) {
                    let message =
                        format!("Flavor access not found for {id} / {project_id} combination.");
                    return Err(Rejection::new(
                        RejectionKind::NotFound,
                        "flavor access",
                        id,
                        message,
                    ));
                }
                Ok(Outcome::Flavor(Box::new(flavor.clone())))
            }
            ComputeCommand::CreateKeypair { name, user_id, kind, public_key, fingerprint } => self
                .create_keypair(Keypair {
                    name: name.clone(),
                    user_id: user_id.clone(),
                    kind: kind.clone(),
                    public_key: public_key.clone(),
                    fingerprint: fingerprint.clone(),
                    created_ms: self.time_ms,
                }),
            ComputeCommand::DeleteKeypair { user_id, name } => {
                match self.compute.keypairs.remove(&(user_id.clone(), name.clone())) {
                    Some(_) => Ok(Outcome::Done),
                    None => Err(Rejection::not_found("keypair", name)),
                }
            }
            ComputeCommand::CreateServerGroup {
                id,
                name,
                project_id,
                user_id,
                policy,
                max_server_per_host,
            } => self.create_group(ServerGroup {
                id: id.clone(),
                name: name.clone(),
                project_id: project_id.clone(),
                user_id: user_id.clone(),
                policy: *policy,
                max_server_per_host: (*max_server_per_host).max(1),
                members: BTreeSet::new(),
                created_ms: self.time_ms,
            }),
            ComputeCommand::DeleteServerGroup(id) => self.delete_group(id),
            ComputeCommand::CreateServer(new) => {
                // A server and its ports stand or fall together: they are made in a copy,
                // which shares everything with this state but what changes.
                let mut next = self.clone();
                let outcome = next.create_server(new)?;
                *self = next;
                Ok(outcome)
            }
            ComputeCommand::UpdateServer { .. } => self.update_server(command),
            ComputeCommand::DeleteServer(id) => self.delete_server(id),
            ComputeCommand::StopServer(id) => self.stop_server(id),
            ComputeCommand::StartServer(id) => self.start_server(id),
            ComputeCommand::RebootServer(id) => self.reboot_server(id),
            ComputeCommand::ServerStarted { id, generation } => {
                self.server_started(id, *generation)
            }
            ComputeCommand::ServerFailed { id, generation, code, message, details } => {
                let fault = Fault {
                    code: *code,
                    message: message.clone(),
                    details: details.clone(),
                    created_ms: self.time_ms,
                };
                self.server_failed(id, *generation, fault)
            }
            ComputeCommand::ServerStopped { id, generation, power_state } => {
                self.server_stopped(id, *generation, *power_state)
            }
            ComputeCommand::EvacuateServer { id, requested_host: _, stop, placement } => {
                self.evacuate_server(id, *stop, placement.as_ref())
            }
            ComputeCommand::ResealServer { id, from, user_data } => {
                self.check_key(Some(user_data))?;
                let known = self.compute.servers.get(id).and_then(|s| s.user_data.as_ref());
                if known.is_none_or(|known| known.key_id() != from) {
                    return Ok(Outcome::Ignored);
                }
                self.server_mut(id)?.user_data = Some(user_data.clone());
                Ok(Outcome::Done)
            }
            ComputeCommand::ServerWaits { id, generation, message } => {
                self.server_waits(id, *generation, message)
            }
            ComputeCommand::ServerGone { id, generation } => {
                let gone = self.compute.servers.get(id).is_some_and(|server| {
                    server.desired == Desired::Deleted && server.generation <= *generation
                });
                if !gone {
                    return Ok(Outcome::Ignored);
                }
                self.remove_server(id);
                Ok(Outcome::Done)
            }
        }
    }

    fn flavor_mut(&mut self, id: &str) -> Result<&mut Flavor, Rejection> {
        self.compute.flavors.get_mut(id).ok_or_else(|| Rejection::not_found("flavor", id))
    }

    fn create_flavor(&mut self, flavor: &Flavor) -> Result<Outcome, Rejection> {
        room(self.compute.flavors.len(), FLAVORS_MAX, "flavor")?;
        if flavor.vcpus == 0 || flavor.ram_mib == 0 {
            let message = "A flavor needs at least one vCPU and 1 MiB of memory.";
            return Err(Rejection::invalid("flavor", &flavor.id, message));
        }
        if self.compute.flavors.contains_key(&flavor.id) {
            let message = format!("Flavor with ID {} already exists.", flavor.id);
            return Err(Rejection::conflict("flavor", &flavor.id, message));
        }
        if self.compute.flavors.values().any(|known| known.name == flavor.name) {
            let message = format!("Flavor with name {} already exists.", flavor.name);
            return Err(Rejection::conflict("flavor", &flavor.name, message));
        }
        self.compute.flavors.insert(flavor.id.clone(), flavor.clone());
        Ok(Outcome::Flavor(Box::new(flavor.clone())))
    }

    fn create_keypair(&mut self, keypair: Keypair) -> Result<Outcome, Rejection> {
        room(self.compute.keypairs.len(), KEYPAIRS_MAX, "keypair")?;
        let key = (keypair.user_id.clone(), keypair.name.clone());
        if self.compute.keypairs.contains_key(&key) {
            let message = format!("Key pair '{}' already exists.", keypair.name);
            return Err(Rejection::conflict("keypair", &keypair.name, message));
        }
        let first = (keypair.user_id.clone(), String::new());
        let held = self.compute.keypairs.range(first..);
        let held = held.take_while(|(key, _)| key.0 == keypair.user_id).count();
        let limit = QuotaResource::KeyPairs.default_limit();
        if i64::try_from(held).is_ok_and(|held| held >= limit) {
            let message = "Quota exceeded, too many key pairs.";
            return Err(Rejection::new(
                RejectionKind::QuotaExceeded,
                "keypair",
                &keypair.name,
                message,
            ));
        }
        self.compute.keypairs.insert(key, keypair.clone());
        Ok(Outcome::Keypair(Box::new(keypair)))
    }

    pub(in crate::state) fn drop_keypairs(&mut self, user: &UserId) {
        let names: Vec<(UserId, String)> = self
            .compute
            .keypairs
            .range((user.clone(), String::new())..)
            .map(|(key, _)| key.clone())
            .take_while(|key| key.0 == *user)
            .collect();
        for key in names {
            self.compute.keypairs.remove(&key);
        }
    }

    fn create_group(&mut self, group: ServerGroup) -> Result<Outcome, Rejection> {
        room(self.compute.groups.len(), SERVER_GROUPS_MAX, "server group")?;
        if self.compute.groups.contains_key(&group.id) {
            let message = format!("Server group {} already exists.", group.id);
            return Err(Rejection::conflict("server group", &group.id, message));
        }
        self.quota.check(&group.project_id, QuotaResource::ServerGroups, 1)?;
        self.quota.charge(&group.project_id, QuotaResource::ServerGroups, 1);
        self.compute.groups.insert(group.id.clone(), group.clone());
        Ok(Outcome::ServerGroup(Box::new(group)))
    }

    fn delete_group(&mut self, id: &ServerGroupId) -> Result<Outcome, Rejection> {
        let Some(group) = self.compute.groups.remove(id) else {
            return Err(Rejection::not_found("instance group", id));
        };
        self.quota.release(&group.project_id, QuotaResource::ServerGroups, 1);
        for member in &group.members {
            if let Ok(server) = self.server_mut(member) {
                server.group_id = None;
            }
        }
        Ok(Outcome::Done)
    }

    pub(super) fn server_mut(&mut self, id: &ServerId) -> Result<&mut Server, Rejection> {
        let server = self.compute.servers.get_mut(id);
        server.map(Arc::make_mut).ok_or_else(|| Rejection::not_found("instance", id))
    }

    fn create_server(&mut self, new: &NewServer) -> Result<Outcome, Rejection> {
        room(self.compute.servers.len(), SERVERS_MAX, "server")?;
        if self.compute.servers.contains_key(&new.id) {
            let message = format!("Instance {} already exists.", new.id);
            return Err(Rejection::conflict("instance", &new.id, message));
        }
        let flavor = self.compute.flavors.get(&new.flavor_id).cloned();
        let flavor = flavor.ok_or_else(|| Rejection::not_found("flavor", &new.flavor_id))?;
        self.check_image(&new.image_id, &flavor)?;
        self.check_key(new.user_data.as_ref())?;
        self.check_server_quota(new, &flavor)?;
        self.room_within(new.metadata.len(), METADATA_MAX, "metadata item")?;
        self.room_within(new.tags.len(), TAGS_MAX, "tag")?;
        let public_key = self.public_key_of(new)?;
        let (host, fault) = match &new.placement {
            Some(Placement::Host(host)) => {
                self.check_placement(*host, &flavor, new.group_id.as_ref(), None)?;
                (Some(*host), None)
            }
            Some(Placement::NoValidHost { message, details }) => (
                None,
                Some(Fault {
                    code: 500,
                    message: message.clone(),
                    details: details.clone(),
                    created_ms: self.time_ms,
                }),
            ),
            None => {
                return Err(Rejection::invalid("instance", &new.id, "The server wasn't placed."));
            }
        };
        if new.networks.len() > SERVER_PORTS_MAX {
            let message = format!("A server can have {SERVER_PORTS_MAX} network devices at most.");
            return Err(Rejection::invalid("instance", &new.id, message));
        }
        let ports = self.server_ports(new, host)?;
        self.join_group(new)?;
        self.place(host, &new.id, &flavor);
        self.quota.charge(&new.project_id, QuotaResource::Instances, 1);
        self.quota.charge(&new.project_id, QuotaResource::Cores, flavor.vcpus.into());
        self.quota.charge(&new.project_id, QuotaResource::Ram, flavor.ram_mib);
        let server = self.new_server(new, flavor, public_key, fault, ports, host);
        self.index.add_server(&server.id, server.image_id.as_ref());
        self.compute.servers.insert(server.id.clone(), Arc::new(server));
        Ok(Outcome::Server(new.id.clone()))
    }

    fn new_server(
        &self,
        new: &NewServer,
        flavor: Flavor,
        public_key: Option<String>,
        fault: Option<Fault>,
        ports: Vec<ServerPort>,
        host: Option<HostId>,
    ) -> Server {
        Server {
            id: new.id.clone(),
            name: new.name.clone(),
            project_id: new.project_id.clone(),
            user_id: new.user_id.clone(),
            description: new.description.clone(),
            image_id: Some(new.image_id.clone()),
            flavor,
            key_name: new.key_name.clone(),
            public_key,
            metadata: new.metadata.clone(),
            tags: new.tags.clone(),
            config_drive: new.config_drive,
            user_data: new.user_data.clone(),
            availability_zone: new.availability_zone.clone(),
            host,
            group_id: new.group_id.clone(),
            hostname: new.hostname.clone(),
            reservation_id: new.reservation_id.clone(),
            launch_index: new.launch_index,
            desired: Desired::Active,
            vm_state: if fault.is_some() { VmState::Error } else { VmState::Building },
            task_state: fault.is_none().then_some(TaskState::Scheduling),
            power_state: PowerState::NoState,
            fault,
            generation: 1,
            ports,
            created_ms: self.time_ms,
            updated_ms: self.time_ms,
            launched_ms: None,
        }
    }

    fn check_image(&self, id: &ImageId, flavor: &Flavor) -> Result<(), Rejection> {
        let image: &Image = self.image.images.get(id).ok_or_else(|| {
            Rejection::invalid("image", id, format!("Can not find requested image {id}."))
        })?;
        let invalid = |message: String| Err(Rejection::invalid("image", id, message));
        if image.status != ImageStatus::Active {
            return invalid(format!("Image {id} is not active."));
        }
        if image.min_ram > flavor.ram_mib {
            return invalid("Flavor's memory is too small for requested image.".into());
        }
        let size = image.content.as_ref().map_or(0, |content| content.virtual_size_bytes);
        let room = flavor.root_gib.saturating_mul(1 << 30);
        if flavor.root_gib > 0 && (image.min_disk > flavor.root_gib || size > room) {
            return invalid(format!(
                "Flavor's disk is too small for requested image. Flavor disk is {room} bytes, image is {size} bytes."
            ));
        }
        Ok(())
    }

    /// True while a server that may still need the image's bytes is being made from it.
    pub(in crate::state) fn image_is_being_used(&self, id: &ImageId) -> bool {
        let made_from = self.index.servers_by_image.get(id).into_iter().flatten();
        made_from
            .filter_map(|id| self.compute.servers.get(id))
            .any(|server| server.vm_state == VmState::Building && server.desired == Desired::Active)
    }

    fn check_server_quota(&self, new: &NewServer, flavor: &Flavor) -> Result<(), Rejection> {
        let project = &new.project_id;
        self.quota.check(project, QuotaResource::Instances, 1)?;
        self.quota.check(project, QuotaResource::Cores, flavor.vcpus.into())?;
        self.quota.check(project, QuotaResource::Ram, flavor.ram_mib)?;
        let items = new.metadata.len() as u64;
        self.quota.check_count(project, QuotaResource::MetadataItems, 0, items)
    }

    fn public_key_of(&self, new: &NewServer) -> Result<Option<String>, Rejection> {
        let Some(name) = &new.key_name else { return Ok(None) };
        match self.compute.keypairs.get(&(new.user_id.clone(), name.clone())) {
            Some(keypair) => Ok(Some(keypair.public_key.clone())),
            None => Err(Rejection::invalid("keypair", name, "Invalid key_name provided.")),
        }
    }

    fn join_group(&mut self, new: &NewServer) -> Result<(), Rejection> {
        let Some(id) = &new.group_id else { return Ok(()) };
        let group = self.compute.groups.get(id);
        let group = group.ok_or_else(|| Rejection::not_found("instance group", id))?;
        self.room_within(group.members.len() + 1, SERVER_GROUP_MEMBERS_MAX, "group member")?;
        let (members, limit) = (group.members.len() as u64, QuotaResource::ServerGroupMembers);
        self.quota.check_count(&new.project_id, limit, members, 1)?;
        if let Some(group) = self.compute.groups.get_mut(id) {
            group.members.insert(new.id.clone());
        }
        Ok(())
    }

    pub(super) fn place(&mut self, host: Option<HostId>, id: &ServerId, flavor: &Flavor) {
        let Some(host) = host else { return };
        let placed = self.compute.placed.entry(host).or_default();
        placed.servers.insert(id.clone());
        placed.vcpus += u64::from(flavor.vcpus);
        placed.ram_mib += flavor.ram_mib;
        placed.disk_gib += flavor.disk_gib();
    }

    /// The ports of a new server, made or bound. A server without a host gets none.
    fn server_ports(
        &mut self,
        new: &NewServer,
        host: Option<HostId>,
    ) -> Result<Vec<ServerPort>, Rejection> {
        let mut ports = Vec::new();
        for wanted in new.networks.iter().filter(|_| host.is_some()) {
            let owned = match &wanted.source {
                PortSource::Existing => false,
                PortSource::New { network_id, fixed_ip } => {
                    let groups = &new.security_groups;
                    let port = NewPort {
                        id: wanted.port_id.clone(),
                        network_id: network_id.clone(),
                        project_id: new.project_id.clone(),
                        name: String::new(),
                        description: String::new(),
                        admin_state_up: true,
                        mac_address: None,
                        fixed_ips: fixed_ip.map(|address| vec![address.into()]),
                        port_security_enabled: None,
                        security_groups: (!groups.is_empty())
                            .then(|| groups.iter().cloned().collect()),
                        allowed_address_pairs: Vec::new(),
                        device_id: String::new(),
                        device_owner: String::new(),
                        tags: BTreeSet::new(),
                    };
                    self.create_port(&port)?;
                    true
                }
            };
            self.bind_port(&wanted.port_id, new, host)?;
            ports.push(ServerPort {
                port_id: wanted.port_id.clone(),
                owned,
                tag: wanted.tag.clone(),
            });
        }
        Ok(ports)
    }

    /// Checks that a host takes a server; `moving` is the server when it comes from another.
    pub(super) fn check_placement(
        &self,
        host: HostId,
        flavor: &Flavor,
        group: Option<&ServerGroupId>,
        moving: Option<&ServerId>,
    ) -> Result<(), Rejection> {
        let stale =
            |why: String| Err(Rejection::new(RejectionKind::PlacementStale, "host", host, why));
        let Some(known) = self.cluster.hosts.get(&host) else {
            return stale(format!("Host {host} is gone."));
        };
        if let Some(why) = known.closed() {
            return stale(format!("Host {} is {why}.", known.name));
        }
        if let Some(shortage) = self.shortage(known, flavor, &Placed::default()) {
            return stale(format!("Host {} is full: {shortage}", known.name));
        }
        let Some(group) = group.and_then(|id| self.compute.groups.get(id)) else { return Ok(()) };
        let (here, elsewhere) = self.members_on(group, host, moving);
        match group.policy {
            GroupPolicy::AntiAffinity if here >= group.max_server_per_host as usize => {
                stale(format!("Host {} has {here} of group {} already.", known.name, group.id))
            }
            GroupPolicy::Affinity if here == 0 && elsewhere > 0 => {
                stale(format!("Group {} is on another host than {}.", group.id, known.name))
            }
            _ => Ok(()),
        }
    }

    /// How many of a group's servers are on a host, and how many on others. For a server that is
    /// `moving`, itself and what is left on hosts that are out don't count.
    pub(crate) fn members_on(
        &self,
        group: &ServerGroup,
        host: HostId,
        moving: Option<&ServerId>,
    ) -> (usize, usize) {
        let out = |host: &HostId| self.cluster.hosts.get(host).is_some_and(Host::is_out);
        let others = group.members.iter().filter(|id| Some(*id) != moving);
        let hosts = others.filter_map(|id| self.compute.servers.get(id)?.host);
        let hosts = hosts.filter(|host| moving.is_none() || !out(host));
        hosts.fold(
            (0, 0),
            |(here, elsewhere), on| {
                if on == host { (here + 1, elsewhere) } else { (here, elsewhere + 1) }
            },
        )
    }

    /// What a host lacks for one more server of this flavor beside what is `promised`
    /// elsewhere, in numbers.
    pub(crate) fn shortage(
        &self,
        host: &Host,
        flavor: &Flavor,
        promised: &Placed,
    ) -> Option<String> {
        let placed = self.compute.placed.get(&host.id).cloned().unwrap_or_default();
        let own_vcpus = u64::from(host.capacity.vcpus);
        let wanted_vcpus = u64::from(flavor.vcpus);
        if wanted_vcpus > own_vcpus {
            return Some(format!("{wanted_vcpus} VCPU wanted, the host has {own_vcpus}"));
        }
        let lacks = |what: &str, wanted: u64, total: u64, used: u64| {
            let free = total.saturating_sub(used);
            (wanted > free).then(|| format!("{wanted} {what} wanted, {free} of {total} free"))
        };
        lacks(
            "VCPU",
            wanted_vcpus,
            own_vcpus.saturating_mul(CPU_ALLOCATION_RATIO),
            placed.vcpus + promised.vcpus,
        )
        .or_else(|| {
            let used = placed.ram_mib + promised.ram_mib;
            lacks("MEMORY_MB", flavor.ram_mib, host.capacity.ram_mib, used)
        })
        .or_else(|| {
            let homed = self.volume.homed.get(&host.id).map_or(0, |homed| homed.size_gib);
            let used = placed.disk_gib + promised.disk_gib + homed;
            lacks("DISK_GB", flavor.disk_gib(), host.capacity.disk_gib, used)
        })
    }

    /// The disk of a host that neither servers nor volumes were promised.
    pub(crate) fn free_disk_gib(&self, host: &Host) -> u64 {
        let placed = self.compute.placed.get(&host.id).map_or(0, |placed| placed.disk_gib);
        let homed = self.volume.homed.get(&host.id).map_or(0, |homed| homed.size_gib);
        host.capacity.disk_gib.saturating_sub(placed).saturating_sub(homed)
    }

    fn update_server(&mut self, command: &ComputeCommand) -> Result<Outcome, Rejection> {
        let ComputeCommand::UpdateServer { id, name, description, hostname, metadata, tags } =
            command
        else {
            return Ok(Outcome::Ignored);
        };
        let project = self.server_mut(id)?.project_id.clone();
        let items = metadata.as_ref().map_or(0, |metadata| metadata.len() as u64);
        self.quota.check_count(&project, QuotaResource::MetadataItems, 0, items)?;
        let sized = |len: Option<usize>, max, what| self.room_within(len.unwrap_or(0), max, what);
        sized(metadata.as_ref().map(|m| m.len()), METADATA_MAX, "metadata item")?;
        sized(tags.as_ref().map(|t| t.len()), TAGS_MAX, "tag")?;
        let now = self.time_ms;
        let server = self.server_mut(id)?;
        set(&mut server.name, name);
        set(&mut server.description, description);
        set(&mut server.hostname, hostname);
        set(&mut server.metadata, metadata);
        set(&mut server.tags, tags);
        server.updated_ms = now;
        Ok(Outcome::Server(id.clone()))
    }

    fn delete_server(&mut self, id: &ServerId) -> Result<Outcome, Rejection> {
        let now = self.time_ms;
        let host = self.server_mut(id)?.host.and_then(|host| self.cluster.hosts.get(&host));
        // Nobody is left to report it gone; the host removes what it still has when it returns.
        let at_once = host.is_none_or(|host| host.is_out() && self.cluster.has(2));
        let server = self.server_mut(id)?;
        if at_once {
            self.remove_server(id);
            return Ok(Outcome::Done);
        }
        if server.desired != Desired::Deleted {
            server.desired = Desired::Deleted;
            server.task_state = Some(TaskState::Deleting);
            server.updated_ms = now;
        }
        Ok(Outcome::Server(id.clone()))
    }

    /// A server that is in one of these states and at rest.
    fn resting(
        &mut self,
        id: &ServerId,
        action: &str,
        states: &[VmState],
    ) -> Result<&mut Server, Rejection> {
        let now = self.time_ms;
        let server = self.server_mut(id)?;
        let wrong = if !states.contains(&server.vm_state) {
            format!("vm_state {}", server.vm_state.as_str())
        } else if let Some(task) = server.task_state {
            format!("task_state {}", task.as_str())
        } else {
            server.updated_ms = now;
            return Ok(server);
        };
        let message = format!("Cannot '{action}' instance {id} while it is in {wrong}");
        Err(Rejection::state("instance", id, message))
    }

    fn stop_server(&mut self, id: &ServerId) -> Result<Outcome, Rejection> {
        let server = self.resting(id, "stop", &[VmState::Active])?;
        server.desired = Desired::Stopped;
        server.task_state = Some(TaskState::PoweringOff);
        Ok(Outcome::Server(id.clone()))
    }

    fn start_server(&mut self, id: &ServerId) -> Result<Outcome, Rejection> {
        let server = self.resting(id, "start", &[VmState::Stopped])?;
        server.desired = Desired::Active;
        server.task_state = Some(TaskState::PoweringOn);
        server.generation += 1;
        Ok(Outcome::Server(id.clone()))
    }

    fn reboot_server(&mut self, id: &ServerId) -> Result<Outcome, Rejection> {
        let server = self.resting(id, "reboot", &[VmState::Active, VmState::Stopped])?;
        server.desired = Desired::Active;
        server.task_state = Some(TaskState::Rebooting);
        server.generation += 1;
        Ok(Outcome::Server(id.clone()))
    }

    /// The server a fact is about, unless the fact is older than it or no longer matters.
    fn observed(&mut self, id: &ServerId, generation: u64) -> Option<&mut Server> {
        let now = self.time_ms;
        let server = self.compute.servers.get_mut(id)?;
        if server.generation != generation || server.desired == Desired::Deleted {
            return None;
        }
        let server = Arc::make_mut(server);
        server.updated_ms = now;
        Some(server)
    }

    fn server_started(&mut self, id: &ServerId, generation: u64) -> Result<Outcome, Rejection> {
        let now = self.time_ms;
        let settled = self.compute.servers.get(id).is_none_or(|server| {
            server.desired != Desired::Active
                || server.vm_state == VmState::Error
                || (server.vm_state == VmState::Active && server.task_state.is_none())
        });
        let Some(server) = (!settled).then(|| self.observed(id, generation)).flatten() else {
            return Ok(Outcome::Ignored);
        };
        server.vm_state = VmState::Active;
        server.task_state = None;
        server.power_state = PowerState::Running;
        server.fault = None;
        server.launched_ms.get_or_insert(now);
        self.show_ports(id, PortStatus::Active);
        Ok(Outcome::Server(id.clone()))
    }

    fn server_failed(
        &mut self,
        id: &ServerId,
        generation: u64,
        fault: Fault,
    ) -> Result<Outcome, Rejection> {
        let Some(server) = self.observed(id, generation) else {
            return Ok(Outcome::Ignored);
        };
        server.vm_state = VmState::Error;
        server.task_state = None;
        server.power_state = PowerState::NoState;
        server.fault = Some(fault);
        self.show_ports(id, PortStatus::Down);
        Ok(Outcome::Server(id.clone()))
    }

    /// A guest that ended is a stopped server, whether that was wanted or the guest's own
    /// doing (Nova's power state synchronisation does the same).
    fn server_stopped(
        &mut self,
        id: &ServerId,
        generation: u64,
        power_state: PowerState,
    ) -> Result<Outcome, Rejection> {
        let now = self.time_ms;
        let settled = self.compute.servers.get(id).is_none_or(|server| {
            server.vm_state == VmState::Error
                || (server.vm_state == VmState::Stopped && server.task_state.is_none())
        });
        let Some(server) = (!settled).then(|| self.observed(id, generation)).flatten() else {
            return Ok(Outcome::Ignored);
        };
        server.desired = Desired::Stopped;
        server.vm_state = VmState::Stopped;
        server.task_state = None;
        server.power_state = power_state;
        server.launched_ms.get_or_insert(now);
        self.show_ports(id, PortStatus::Down);
        Ok(Outcome::Server(id.clone()))
    }

    pub(in crate::state) fn remove_server(&mut self, id: &ServerId) {
        let Some(server) = self.compute.servers.remove(id) else { return };
        self.index.remove_server(id, server.image_id.as_ref());
        self.free_volumes_of(id);
        for port in &server.ports {
            if port.owned {
                self.remove_port(&port.port_id);
            } else {
                self.unbind_port(&port.port_id);
            }
        }
        if let Some(group) = server.group_id.as_ref().and_then(|g| self.compute.groups.get_mut(g)) {
            group.members.remove(id);
        }
        self.quota.release(&server.project_id, QuotaResource::Instances, 1);
        self.quota.release(&server.project_id, QuotaResource::Cores, server.flavor.vcpus.into());
        self.quota.release(&server.project_id, QuotaResource::Ram, server.flavor.ram_mib);
        self.unplace(server.host, id, &server.flavor);
    }

    /// Gives back what a server takes of its host.
    pub(super) fn unplace(&mut self, host: Option<HostId>, id: &ServerId, flavor: &Flavor) {
        let Some(host) = host else { return };
        let Some(placed) = self.compute.placed.get_mut(&host) else { return };
        placed.servers.remove(id);
        placed.vcpus = placed.vcpus.saturating_sub(flavor.vcpus.into());
        placed.ram_mib = placed.ram_mib.saturating_sub(flavor.ram_mib);
        placed.disk_gib = placed.disk_gib.saturating_sub(flavor.disk_gib());
        if placed.servers.is_empty() {
            self.compute.placed.remove(&host);
        }
    }
}
