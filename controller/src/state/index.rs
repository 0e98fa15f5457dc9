//! What follows from the state and is looked up at every command. It is not in snapshots: it is
//! made again when one is read, and `check_invariants` compares it with the long way.

use std::net::IpAddr;

use imbl::{OrdMap, OrdSet};

use super::State;
use super::identity::{Project, User};
use super::network::{FloatingIp, Subnet, VNI_FIRST, VNI_LAST, next_address};
use crate::ids::{
    DomainId, FloatingIpId, ImageId, NetworkId, PortId, ProjectId, ServerId, SubnetId, UserId,
};

/// Look-ups. Two states that are equal have equal answers here, so comparing skips it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Index {
    pub(super) subnets: OrdMap<NetworkId, OrdSet<SubnetId>>,
    pub(super) projects: OrdMap<(DomainId, String), ProjectId>,
    pub(super) users: OrdMap<(DomainId, String), UserId>,
    pub(super) servers_by_image: OrdMap<ImageId, OrdSet<ServerId>>,
    pub(super) floating_by_port: OrdMap<PortId, OrdSet<FloatingIpId>>,
    free_vnis: OrdSet<u32>,
    /// VXLAN identifiers from here on were never given out; `None` before the first.
    vni_frontier: Option<u32>,
    free_addresses: OrdMap<SubnetId, Vec<FreeAddresses>>,
}

impl PartialEq for Index {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

/// What is free in one allocation pool.
#[derive(Clone, Debug)]
pub(super) struct FreeAddresses {
    start: IpAddr,
    end: IpAddr,
    /// Given back, below the frontier.
    freed: OrdSet<IpAddr>,
    /// Below it everything is taken or in `freed`; `None` past the pool's end.
    frontier: Option<IpAddr>,
}

/// Adds to a set in a map of sets.
fn add<K: Ord + Clone, V: Ord + Clone>(map: &mut OrdMap<K, OrdSet<V>>, key: K, value: V) {
    map.entry(key).or_default().insert(value);
}

/// Takes from a set in a map of sets.
fn take<K: Ord + Clone, V: Ord + Clone>(map: &mut OrdMap<K, OrdSet<V>>, key: &K, value: &V) {
    if let Some(set) = map.get_mut(key) {
        set.remove(value);
        if set.is_empty() {
            map.remove(key);
        }
    }
}

/// The ports that a floating IP leads to.
fn targets(floating: &FloatingIp) -> impl Iterator<Item = &PortId> {
    let single = floating.port_forwardings.values().map(|forwarding| &forwarding.internal_port_id);
    floating.port_id.iter().chain(single)
}

impl Index {
    /// Everything anew, the long way.
    pub(super) fn of(state: &State) -> Self {
        let mut index = Self::default();
        state.network.subnets.values().for_each(|subnet| index.add_subnet(subnet));
        state.identity.projects.values().for_each(|project| index.add_project(project));
        state.identity.users.values().for_each(|user| index.add_user(user));
        for server in state.compute.servers.values() {
            index.add_server(&server.id, server.image_id.as_ref());
        }
        state.network.floating_ips.values().for_each(|floating| index.add_floating(floating));
        state.network.vnis.keys().for_each(|vni| index.take_vni(*vni));
        index
    }

    pub(super) fn add_subnet(&mut self, subnet: &Subnet) {
        add(&mut self.subnets, subnet.network_id.clone(), subnet.id.clone());
    }

    pub(super) fn remove_subnet(&mut self, subnet: &Subnet) {
        take(&mut self.subnets, &subnet.network_id, &subnet.id);
        self.free_addresses.remove(&subnet.id);
    }

    /// A subnet's pools or gateway changed.
    pub(super) fn forget_addresses(&mut self, subnet: &SubnetId) {
        self.free_addresses.remove(subnet);
    }

    pub(super) fn add_project(&mut self, project: &Project) {
        let key = (project.domain_id.clone(), project.name.clone());
        self.projects.insert(key, project.id.clone());
    }

    pub(super) fn remove_project(&mut self, project: &Project) {
        self.projects.remove(&(project.domain_id.clone(), project.name.clone()));
    }

    pub(super) fn add_user(&mut self, user: &User) {
        self.users.insert((user.domain_id.clone(), user.name.clone()), user.id.clone());
    }

    pub(super) fn remove_user(&mut self, user: &User) {
        self.users.remove(&(user.domain_id.clone(), user.name.clone()));
    }

    pub(super) fn add_server(&mut self, id: &ServerId, image: Option<&ImageId>) {
        if let Some(image) = image {
            add(&mut self.servers_by_image, image.clone(), id.clone());
        }
    }

    pub(super) fn remove_server(&mut self, id: &ServerId, image: Option<&ImageId>) {
        if let Some(image) = image {
            take(&mut self.servers_by_image, image, id);
        }
    }

    pub(super) fn add_floating(&mut self, floating: &FloatingIp) {
        for port in targets(floating) {
            add(&mut self.floating_by_port, port.clone(), floating.id.clone());
        }
    }

    pub(super) fn remove_floating(&mut self, floating: &FloatingIp) {
        for port in targets(floating) {
            take(&mut self.floating_by_port, port, &floating.id);
        }
    }

    /// The lowest VXLAN identifier that is free.
    pub(super) fn lowest_vni(&self) -> Option<u32> {
        let frontier = self.vni_frontier.unwrap_or(VNI_FIRST);
        let lowest = self.free_vnis.get_min().copied().unwrap_or(frontier);
        (lowest <= VNI_LAST).then_some(lowest)
    }

    /// An identifier is given out: the lowest free one, or when all are entered in order.
    pub(super) fn take_vni(&mut self, vni: u32) {
        let frontier = self.vni_frontier.unwrap_or(VNI_FIRST);
        if self.free_vnis.remove(&vni).is_none() && vni >= frontier {
            self.free_vnis.extend(frontier..vni);
            self.vni_frontier = Some(vni + 1);
        }
    }

    pub(super) fn free_vni(&mut self, vni: u32) {
        self.free_vnis.insert(vni);
    }

    /// An address is no longer free. `is_taken` says what is, this address included.
    pub(super) fn take_address(
        &mut self,
        subnet: &Subnet,
        address: IpAddr,
        is_taken: &dyn Fn(IpAddr) -> bool,
    ) {
        let fresh = || {
            let pools = subnet.allocation_pools.iter();
            pools.map(|pool| FreeAddresses::new(pool.start, pool.end)).collect()
        };
        let blocked = |address| subnet.gateway_ip == Some(address) || is_taken(address);
        let pools = self.free_addresses.entry(subnet.id.clone()).or_insert_with(fresh);
        for pool in pools.iter_mut() {
            pool.freed.remove(&address);
            pool.advance(&blocked);
        }
    }

    pub(super) fn free_address(&mut self, subnet: &SubnetId, address: IpAddr) {
        for pool in self.free_addresses.get_mut(subnet).into_iter().flatten() {
            let inside = (pool.start..=pool.end).contains(&address);
            if inside && pool.frontier.is_none_or(|frontier| address < frontier) {
                pool.freed.insert(address);
            }
        }
    }

    /// What is free in the pools of a subnet; `None` when nothing is known yet.
    pub(super) fn free_in(&self, subnet: &SubnetId) -> Option<&[FreeAddresses]> {
        self.free_addresses.get(subnet).map(Vec::as_slice)
    }

    /// Checks that this is what `of` makes.
    pub(super) fn check(&self, state: &State) -> Result<(), String> {
        let right = Self::of(state);
        let same = self.subnets == right.subnets
            && self.projects == right.projects
            && self.users == right.users
            && self.servers_by_image == right.servers_by_image
            && self.floating_by_port == right.floating_by_port
            && self.lowest_vni() == right.lowest_vni();
        if !same {
            return Err(format!("the index should be {right:?}, is {self:?}"));
        }
        for subnet in state.network.subnets.values() {
            let (quick, slow) =
                (state.lowest_free(subnet, &[]), state.lowest_free_by_walking(subnet, &[]));
            if quick != slow {
                return Err(format!("subnet {}: {slow:?} is free, not {quick:?}", subnet.id));
            }
        }
        Ok(())
    }
}

impl FreeAddresses {
    fn new(start: IpAddr, end: IpAddr) -> Self {
        Self { start, end, freed: OrdSet::new(), frontier: Some(start) }
    }

    /// The first address that `free` admits: of those given back, then from the frontier on.
    pub(super) fn first(&self, free: impl Fn(&IpAddr) -> bool) -> Option<IpAddr> {
        let given_back = self.freed.iter().copied().find(&free);
        let within = |address: &IpAddr| *address <= self.end;
        let mut rest = std::iter::successors(self.frontier, |at| next_address(*at).filter(within));
        given_back.or_else(|| rest.find(&free))
    }

    fn advance(&mut self, blocked: &dyn Fn(IpAddr) -> bool) {
        while let Some(address) = self.frontier.filter(|address| blocked(*address)) {
            self.frontier = next_address(address).filter(|next| *next <= self.end);
        }
    }
}
