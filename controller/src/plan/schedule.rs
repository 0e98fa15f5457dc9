//! Placement: which host a server or a volume goes to. Filters and weighers as in Nova,
//! a pure function of the state, the hosts that live and the leader's own placements
//! that aren't in the state yet.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::ids::{HostId, ServerGroupId, ServerId, VolumeId};
use crate::state::State;
use crate::state::cluster::Host;
use crate::state::compute::{Flavor, GroupPolicy, NewServer, Placed, Placement, ServerGroup};
use crate::state::volume::NewVolume;

/// How many of the leader's own placements are remembered until they are in the state.
pub const IN_FLIGHT_MAX: usize = 4096;

/// Which hosts are heard from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Liveness {
    /// Hosts whose heartbeat is fresh.
    pub up: BTreeSet<HostId>,
}

/// Placements that the leader made and whose commands are under way. Each ends with its command:
/// one that is refused, or lost with the leader, must not hold its host's room.
#[derive(Clone, Debug, Default)]
pub struct InFlight {
    servers: BTreeMap<ServerId, Promise>,
    volumes: BTreeMap<VolumeId, (u64, HostId, u64)>,
    sequence: u64,
}

#[derive(Clone, Debug)]
struct Promise {
    sequence: u64,
    host: HostId,
    flavor: Flavor,
    group: Option<ServerGroupId>,
    /// The host that the server is evacuated from; none for a new one.
    from: Option<HostId>,
}

impl Promise {
    /// True while the state doesn't show what was promised.
    fn is_open(&self, id: &ServerId, state: &State) -> bool {
        let server = state.compute.servers.get(id);
        match self.from {
            None => server.is_none(),
            Some(from) => server.is_some_and(|server| server.host == Some(from)),
        }
    }
}

/// What is to be placed.
#[derive(Clone, Copy, Debug)]
struct Request<'a> {
    id: &'a ServerId,
    flavor: &'a Flavor,
    group_id: Option<&'a ServerGroupId>,
    zone: Option<&'a str>,
    host_name: Option<&'a str>,
    /// The host that the server is evacuated from; none for a new one.
    from: Option<HostId>,
}

impl InFlight {
    /// Forgets what is in the state now, and the oldest above the limit (a placement whose
    /// command never made it into the log).
    pub fn settle(&mut self, state: &State) {
        self.servers.retain(|id, promise| promise.is_open(id, state));
        self.volumes.retain(|id, _| !state.volume.volumes.contains_key(id));
        let oldest = self.sequence.saturating_sub(IN_FLIGHT_MAX as u64);
        self.servers.retain(|_, promise| promise.sequence >= oldest);
        self.volumes.retain(|_, (sequence, _, _)| *sequence >= oldest);
    }

    /// The number of the last promise.
    pub fn last(&self) -> u64 {
        self.sequence
    }

    /// Ends a promise, because its command has an outcome: what was done is in the state now.
    pub fn end(&mut self, sequence: u64) {
        self.servers.retain(|_, promise| promise.sequence != sequence);
        self.volumes.retain(|_, (promised, _, _)| *promised != sequence);
    }

    fn promise_server(&mut self, request: &Request<'_>, host: HostId) {
        self.sequence += 1;
        let promise = Promise {
            sequence: self.sequence,
            host,
            flavor: request.flavor.clone(),
            group: request.group_id.cloned(),
            from: request.from,
        };
        self.servers.insert(request.id.clone(), promise);
    }

    fn promise_volume(&mut self, new: &NewVolume, host: HostId) {
        self.sequence += 1;
        self.volumes.insert(new.id.clone(), (self.sequence, host, new.size_gib));
    }

    /// What a host was promised, except to this server.
    fn promised(&self, host: HostId, except: &ServerId) -> Placed {
        let mut placed = Placed::default();
        for (id, promise) in &self.servers {
            if promise.host == host && id != except {
                placed.servers.insert(id.clone());
                placed.vcpus += u64::from(promise.flavor.vcpus);
                placed.ram_mib += promise.flavor.ram_mib;
                placed.disk_gib += promise.flavor.disk_gib();
            }
        }
        placed.disk_gib += self.promised_gib(host, None);
        placed
    }

    fn promised_gib(&self, host: HostId, except: Option<&VolumeId>) -> u64 {
        let of_host = |(id, (_, on, _)): &(&VolumeId, &(u64, HostId, u64))| {
            *on == host && Some(*id) != except
        };
        self.volumes.iter().filter(of_host).map(|(_, (_, _, size))| size).sum()
    }

    /// A group's servers promised to a host, and to others.
    fn members_on(&self, group: &ServerGroupId, host: HostId, except: &ServerId) -> (usize, usize) {
        let of_group = self
            .servers
            .iter()
            .filter(|(id, promise)| promise.group.as_ref() == Some(group) && *id != except);
        of_group.fold((0, 0), |(here, elsewhere), (_, promise)| {
            if promise.host == host { (here + 1, elsewhere) } else { (here, elsewhere + 1) }
        })
    }
}

/// A host that is still in the running, with what the weighers look at.
struct Candidate<'a> {
    host: &'a Host,
    promised: Placed,
    /// The group's servers here and elsewhere.
    members: (usize, usize),
}

/// Chooses a new server's host, or says which filter removed which host.
pub fn schedule(
    state: &State,
    liveness: &Liveness,
    in_flight: &InFlight,
    new: &NewServer,
) -> Placement {
    match request_of(state, new) {
        Ok(request) => choose(state, liveness, in_flight, &request),
        Err(nowhere) => nowhere,
    }
}

fn request_of<'a>(state: &'a State, new: &'a NewServer) -> Result<Request<'a>, Placement> {
    let flavor = state
        .compute
        .flavors
        .get(&new.flavor_id)
        .ok_or_else(|| nowhere(vec![format!("flavor {} does not exist", new.flavor_id)], 0))?;
    Ok(Request {
        id: &new.id,
        flavor,
        group_id: new.group_id.as_ref(),
        zone: new.availability_zone.as_deref(),
        host_name: new.requested_host.as_deref(),
        from: None,
    })
}

fn choose(
    state: &State,
    liveness: &Liveness,
    in_flight: &InFlight,
    request: &Request<'_>,
) -> Placement {
    let group = request.group_id.and_then(|id| state.compute.groups.get(id));
    let mut left: Vec<Candidate<'_>> = state
        .cluster
        .hosts
        .values()
        .filter(|host| Some(host.id) != request.from)
        .map(|host| candidate(state, in_flight, request, host, group))
        .collect();
    let total = left.len();
    let mut log = Vec::new();
    let mut filter = |name: &str, why: &dyn Fn(&Candidate<'_>) -> Option<String>| {
        if left.is_empty() {
            return;
        }
        let mut removed = Vec::new();
        left.retain(|candidate| match why(candidate) {
            None => true,
            Some(reason) => {
                removed.push(format!("{}: {reason}", candidate.host.name));
                false
            }
        });
        if !removed.is_empty() {
            log.push(format!("{name} removed {}", removed.join("; ")));
        }
    };
    filter("ComputeFilter", &|c| unusable(c.host, liveness));
    filter("AvailabilityZoneFilter", &|c| {
        let wanted = request.zone?;
        (wanted != c.host.availability_zone)
            .then(|| format!("is in zone {}, not {wanted}", c.host.availability_zone))
    });
    filter("HostNameFilter", &|c| {
        let wanted = request.host_name?;
        (wanted != c.host.name).then(|| format!("{wanted} was asked for"))
    });
    filter("ResourceFilter", &|c| state.shortage(c.host, request.flavor, &c.promised));
    filter("ServerGroupFilter", &|c| group.and_then(|group| group_refuses(group, c)));
    let best = left.iter().max_by_key(|candidate| weight(state, group, candidate));
    match best {
        Some(best) => Placement::Host(best.host.id),
        None => nowhere(log, total),
    }
}

fn candidate<'a>(
    state: &State,
    in_flight: &InFlight,
    request: &Request<'_>,
    host: &'a Host,
    group: Option<&ServerGroup>,
) -> Candidate<'a> {
    let members = group.map_or((0, 0), |group| {
        let moving = request.from.map(|_| request.id);
        let placed = state.members_on(group, host.id, moving);
        let promised = in_flight.members_on(&group.id, host.id, request.id);
        (placed.0 + promised.0, placed.1 + promised.1)
    });
    Candidate { host, promised: in_flight.promised(host.id, request.id), members }
}

fn unusable(host: &Host, liveness: &Liveness) -> Option<String> {
    if host.fenced.is_some() {
        return Some("is fenced".into());
    }
    if host.forced_down {
        return Some("was forced down by an operator".into());
    }
    if !liveness.up.contains(&host.id) {
        return Some("is down (no heartbeat)".into());
    }
    host.disabled.then(|| match &host.disabled_reason {
        Some(reason) => format!("is disabled ({reason})"),
        None => "is disabled".into(),
    })
}

fn group_refuses(group: &ServerGroup, candidate: &Candidate<'_>) -> Option<String> {
    let (here, elsewhere) = candidate.members;
    match group.policy {
        GroupPolicy::AntiAffinity if here >= group.max_server_per_host as usize => {
            Some(format!("has {here} of anti-affinity group {} already", group.name))
        }
        GroupPolicy::Affinity if here == 0 && elsewhere > 0 => {
            Some(format!("has none of affinity group {}, which is elsewhere", group.name))
        }
        _ => None,
    }
}

/// The soft policies first, then the most free memory, then the fewest servers, then the
/// lowest id.
fn weight(
    state: &State,
    group: Option<&ServerGroup>,
    candidate: &Candidate<'_>,
) -> (Reverse<usize>, u64, Reverse<usize>, Reverse<HostId>) {
    let placed = state.compute.placed.get(&candidate.host.id);
    let servers = placed.map_or(0, |placed| placed.servers.len());
    let used = placed.map_or(0, |placed| placed.ram_mib) + candidate.promised.ram_mib;
    let apart = match group.map(|group| group.policy) {
        Some(GroupPolicy::SoftAffinity) => candidate.members.1,
        Some(GroupPolicy::SoftAntiAffinity) => candidate.members.0,
        _ => 0,
    };
    (
        Reverse(apart),
        candidate.host.capacity.ram_mib.saturating_sub(used),
        Reverse(servers + candidate.promised.servers.len()),
        Reverse(candidate.host.id),
    )
}

fn nowhere(log: Vec<String>, total: usize) -> Placement {
    let details = if log.is_empty() {
        "The cluster has no hosts.".to_owned()
    } else {
        format!("Of {total} hosts: {}.", log.join(". "))
    };
    Placement::NoValidHost { message: format!("No valid host was found. {details}"), details }
}

/// Chooses a volume's home: the most free disk.
fn schedule_volume(
    state: &State,
    liveness: &Liveness,
    in_flight: &InFlight,
    new: &NewVolume,
) -> Placement {
    let mut log = Vec::new();
    let mut best: Option<(u64, Reverse<HostId>)> = None;
    for host in state.cluster.hosts.values() {
        let promised = in_flight.promised_gib(host.id, Some(&new.id));
        let free = state.free_disk_gib(host).saturating_sub(promised);
        let zone = new.availability_zone.as_deref();
        let refusal = unusable(host, liveness)
            .map(|why| format!("ComputeFilter removed {}: {why}", host.name))
            .or_else(|| {
                zone.filter(|zone| *zone != host.availability_zone).map(|zone| {
                    format!("AvailabilityZoneFilter removed {}: not in {zone}", host.name)
                })
            })
            .or_else(|| {
                (free < new.size_gib).then(|| {
                    format!(
                        "CapacityFilter removed {}: {} GiB wanted, {free} free",
                        host.name, new.size_gib
                    )
                })
            });
        match refusal {
            Some(refusal) => log.push(refusal),
            None => best = best.max(Some((free, Reverse(host.id)))),
        }
    }
    match best {
        Some((_, Reverse(host))) => Placement::Host(host),
        None => nowhere(log, state.cluster.hosts.len()),
    }
}

/// Places a server, and remembers it until it is in the state.
pub(super) fn place_server(
    state: &State,
    liveness: &Liveness,
    in_flight: &mut InFlight,
    new: &mut NewServer,
) {
    let placement = match request_of(state, new) {
        Ok(request) => promise(state, liveness, in_flight, &request),
        Err(nowhere) => nowhere,
    };
    new.placement = Some(placement);
}

/// Chooses where a server is made anew, and remembers it until it is in the state. `None` for a
/// server that isn't on a host.
pub(super) fn place_again(
    state: &State,
    liveness: &Liveness,
    in_flight: &mut InFlight,
    id: &ServerId,
    host_name: Option<&str>,
) -> Option<Placement> {
    let server = state.compute.servers.get(id)?;
    let request = Request {
        id,
        flavor: &server.flavor,
        group_id: server.group_id.as_ref(),
        zone: server.availability_zone.as_deref(),
        host_name,
        from: Some(server.host?),
    };
    // What can't move anyway is refused where it is applied; it must not take room here.
    match state.evacuation_obstacle(server) {
        Some(_) => Some(choose(state, liveness, in_flight, &request)),
        None => Some(promise(state, liveness, in_flight, &request)),
    }
}

fn promise(
    state: &State,
    liveness: &Liveness,
    in_flight: &mut InFlight,
    request: &Request<'_>,
) -> Placement {
    let placement = choose(state, liveness, in_flight, request);
    if let Placement::Host(host) = placement {
        in_flight.promise_server(request, host);
    }
    placement
}

/// Chooses a volume's home, and remembers it until it is in the state.
pub(super) fn place_volume(
    state: &State,
    liveness: &Liveness,
    in_flight: &mut InFlight,
    new: &mut NewVolume,
) {
    let placement = schedule_volume(state, liveness, in_flight, new);
    if let Placement::Host(host) = placement {
        in_flight.promise_volume(new, host);
    }
    new.placement = Some(placement);
}
