//! Changes of security groups and their rules.

use std::collections::BTreeSet;

use imbl::OrdMap;
use ipnet::IpNet;

use super::addresses::DONE;
use super::{Direction, Ethertype, NetworkCommand, NewRule, SecurityGroup, SecurityGroupRule};
use crate::ids::{ProjectId, SecurityGroupId, SecurityGroupRuleId, derived_id};
use crate::plan::protocol;
use crate::state::identity::set;
use crate::state::limits::{SECURITY_GROUP_RULES_MAX, SECURITY_GROUPS_MAX, room};
use crate::state::outcome::{Outcome, Rejection, RejectionKind};
use crate::state::{QuotaResource, State};

/// The name of the group that every project has.
pub const DEFAULT_GROUP: &str = "default";

impl State {
    /// The id of a project's default security group, whether it exists yet or not.
    pub fn default_group_id(project: &ProjectId) -> SecurityGroupId {
        derived_id("security-group/default", project.as_str()).into()
    }

    pub(super) fn show_group(&self, id: &SecurityGroupId) -> Result<Outcome, Rejection> {
        let group = self.network.security_groups.get(id);
        let group = group.ok_or_else(|| Rejection::not_found("security group", id))?;
        Ok(Outcome::SecurityGroup(Box::new(group.clone())))
    }

    /// A project's default group, made where it is missing: everything out, everything in
    /// from its own members.
    pub(in crate::state) fn ensure_default_group(
        &mut self,
        project: &ProjectId,
    ) -> SecurityGroupId {
        let id = Self::default_group_id(project);
        if self.network.security_groups.contains_key(&id) {
            return id;
        }
        let mut group = self.empty_group(&id, project, DEFAULT_GROUP);
        group.description = "Default security group".into();
        for ethertype in [Ethertype::IPv4, Ethertype::IPv6] {
            add(&mut group, Direction::Egress, ethertype, None);
            add(&mut group, Direction::Ingress, ethertype, Some(id.clone()));
        }
        self.insert_group(group);
        id
    }

    fn empty_group(&self, id: &SecurityGroupId, project: &ProjectId, name: &str) -> SecurityGroup {
        SecurityGroup {
            id: id.clone(),
            project_id: project.clone(),
            name: name.to_owned(),
            description: String::new(),
            stateful: true,
            rules: OrdMap::new(),
            tags: BTreeSet::new(),
            revision_number: 1,
            created_ms: self.time_ms,
            updated_ms: self.time_ms,
        }
    }

    fn insert_group(&mut self, group: SecurityGroup) {
        let rules = group.rules.len() as u64;
        self.quota.charge(&group.project_id, QuotaResource::SecurityGroups, 1);
        self.quota.charge(&group.project_id, QuotaResource::SecurityGroupRules, rules);
        self.network.security_groups.insert(group.id.clone(), group);
    }

    pub(super) fn create_group_of_rules(
        &mut self,
        command: &NetworkCommand,
    ) -> Result<Outcome, Rejection> {
        let NetworkCommand::CreateSecurityGroup {
            id,
            project_id,
            name,
            description,
            stateful,
            tags,
        } = command
        else {
            return Ok(Outcome::Ignored);
        };
        room(self.network.security_groups.len(), SECURITY_GROUPS_MAX, "security group")?;
        if self.network.security_groups.contains_key(id) {
            let message = format!("Security group {id} already exists.");
            return Err(Rejection::conflict("security group", id, message));
        }
        if name == DEFAULT_GROUP {
            let message = "Default security group already exists.";
            return Err(Rejection::conflict("security group", name, message));
        }
        if !*stateful {
            let message = "Stateless security groups are not supported.";
            return Err(Rejection::invalid("security group", id, message));
        }
        self.quota.check(project_id, QuotaResource::SecurityGroups, 1)?;
        self.quota.check(project_id, QuotaResource::SecurityGroupRules, 2)?;
        let mut group = self.empty_group(id, project_id, name);
        group.description.clone_from(description);
        group.tags.clone_from(tags);
        add(&mut group, Direction::Egress, Ethertype::IPv4, None);
        add(&mut group, Direction::Egress, Ethertype::IPv6, None);
        self.insert_group(group);
        self.show_group(id)
    }

    pub(super) fn update_group_of_rules(
        &mut self,
        id: &SecurityGroupId,
        name: &Option<String>,
        description: &Option<String>,
        tags: &Option<BTreeSet<String>>,
    ) -> Result<Outcome, Rejection> {
        let now = self.time_ms;
        let group = self.network.security_groups.get_mut(id);
        let group = group.ok_or_else(|| Rejection::not_found("security group", id))?;
        let renames = name.as_ref().is_some_and(|name| *name != group.name);
        if renames && (group.name == DEFAULT_GROUP || name.as_deref() == Some(DEFAULT_GROUP)) {
            let message = "Updating default security group not allowed.";
            return Err(Rejection::in_use("security group", id, message));
        }
        set(&mut group.name, name);
        set(&mut group.description, description);
        set(&mut group.tags, tags);
        group.revision_number += 1;
        group.updated_ms = now;
        self.show_group(id)
    }

    pub(super) fn delete_group_of_rules(
        &mut self,
        id: &SecurityGroupId,
    ) -> Result<Outcome, Rejection> {
        let group = self.network.security_groups.get(id);
        let group = group.ok_or_else(|| Rejection::not_found("security group", id))?;
        let project_is_there = self.identity.projects.contains_key(&group.project_id);
        if group.name == DEFAULT_GROUP && project_is_there {
            let message = "Insufficient rights for removing default security group.";
            return Err(Rejection::in_use("security group", id, message));
        }
        if self.network.group_ports.contains_key(id) {
            let message = format!("Security Group {id} in use.");
            return Err(Rejection::in_use("security group", id, message));
        }
        self.remove_group(id);
        DONE
    }

    /// Removes a group, and the rules of others that admit its members.
    fn remove_group(&mut self, id: &SecurityGroupId) {
        let Some(group) = self.network.security_groups.remove(id) else { return };
        let rules = group.rules.len() as u64;
        self.quota.release(&group.project_id, QuotaResource::SecurityGroups, 1);
        self.quota.release(&group.project_id, QuotaResource::SecurityGroupRules, rules);
        let dangling: Vec<SecurityGroupRuleId> = self
            .network
            .security_groups
            .values()
            .flat_map(|group| group.rules.values())
            .filter(|rule| rule.remote_group_id.as_ref() == Some(id))
            .map(|rule| rule.id.clone())
            .collect();
        for rule in dangling {
            self.remove_rule(&rule);
        }
    }

    /// Removes the default group of a project that is gone, unless a port still uses it.
    pub(in crate::state) fn drop_unused_default_group(&mut self, project: &ProjectId) {
        let id = Self::default_group_id(project);
        if !self.network.group_ports.contains_key(&id) {
            self.remove_group(&id);
        }
    }

    pub(super) fn create_rule(&mut self, new: &NewRule) -> Result<Outcome, Rejection> {
        let group = self.network.security_groups.get(&new.security_group_id);
        let group =
            group.ok_or_else(|| Rejection::not_found("security group", &new.security_group_id))?;
        check_rule(new)?;
        if let Some(remote) = &new.remote_group_id
            && !self.network.security_groups.contains_key(remote)
        {
            return Err(Rejection::not_found("security group", remote));
        }
        if let Some(same) = group.rules.values().find(|known| is_same(known, new)) {
            let message = format!("Security group rule already exists. Rule id is {}.", same.id);
            return Err(Rejection::conflict("security group rule", &same.id, message));
        }
        let project_id = group.project_id.clone();
        self.room_within(group.rules.len() + 1, SECURITY_GROUP_RULES_MAX, "rule of the group")?;
        self.quota.check(&project_id, QuotaResource::SecurityGroupRules, 1)?;
        let rule = SecurityGroupRule {
            id: new.id.clone(),
            security_group_id: new.security_group_id.clone(),
            project_id: project_id.clone(),
            description: new.description.clone(),
            direction: new.direction,
            ethertype: new.ethertype,
            protocol: new.protocol.clone(),
            port_range_min: new.port_range_min,
            port_range_max: new.port_range_max,
            remote_ip_prefix: new.remote_ip_prefix.map(|prefix| prefix.trunc()),
            remote_group_id: new.remote_group_id.clone(),
            revision_number: 0,
            created_ms: self.time_ms,
        };
        self.quota.charge(&project_id, QuotaResource::SecurityGroupRules, 1);
        let now = self.time_ms;
        if let Some(group) = self.network.security_groups.get_mut(&new.security_group_id) {
            group.rules.insert(rule.id.clone(), rule.clone());
            group.revision_number += 1;
            group.updated_ms = now;
        }
        Ok(Outcome::SecurityGroupRule(Box::new(rule)))
    }

    pub(super) fn delete_rule(&mut self, id: &SecurityGroupRuleId) -> Result<Outcome, Rejection> {
        if self.remove_rule(id) {
            return DONE;
        }
        Err(Rejection::not_found("security group rule", id))
    }

    fn remove_rule(&mut self, id: &SecurityGroupRuleId) -> bool {
        let holder = self.network.security_groups.values().find(|g| g.rules.contains_key(id));
        let Some(holder) = holder.map(|group| group.id.clone()) else { return false };
        let now = self.time_ms;
        let Some(group) = self.network.security_groups.get_mut(&holder) else { return false };
        group.rules.remove(id);
        group.revision_number += 1;
        group.updated_ms = now;
        let project = group.project_id.clone();
        self.quota.release(&project, QuotaResource::SecurityGroupRules, 1);
        true
    }
}

/// Adds one of the rules that a group is made with; its id follows from the group's.
fn add(
    group: &mut SecurityGroup,
    direction: Direction,
    ethertype: Ethertype,
    remote_group_id: Option<SecurityGroupId>,
) {
    let kind = format!("security-group-rule/{}/{}", direction.as_str(), ethertype.as_str());
    let id = SecurityGroupRuleId::from(derived_id(&kind, group.id.as_str()));
    let rule = SecurityGroupRule {
        id: id.clone(),
        security_group_id: group.id.clone(),
        project_id: group.project_id.clone(),
        description: String::new(),
        direction,
        ethertype,
        protocol: None,
        port_range_min: None,
        port_range_max: None,
        remote_ip_prefix: None,
        remote_group_id,
        revision_number: 0,
        created_ms: group.created_ms,
    };
    group.rules.insert(id, rule);
}

fn is_same(known: &SecurityGroupRule, new: &NewRule) -> bool {
    let ipv6 = new.ethertype == Ethertype::IPv6;
    let number =
        |name: &Option<String>| name.as_deref().and_then(|name| protocol::number(name, ipv6));
    known.direction == new.direction
        && known.ethertype == new.ethertype
        && number(&known.protocol) == number(&new.protocol)
        && known.port_range_min == new.port_range_min
        && known.port_range_max == new.port_range_max
        && known.remote_ip_prefix == new.remote_ip_prefix.map(|prefix| prefix.trunc())
        && known.remote_group_id == new.remote_group_id
}

/// IP protocols that have ports.
const WITH_PORTS: [u8; 5] = [6, 17, 33, 132, 136];

fn check_rule(new: &NewRule) -> Result<(), Rejection> {
    let invalid =
        |message: String| Err(Rejection::invalid("security group rule", &new.id, message));
    if new.remote_ip_prefix.is_some() && new.remote_group_id.is_some() {
        return invalid("Only remote_ip_prefix or remote_group_id may be provided.".into());
    }
    let ipv6 = new.ethertype == Ethertype::IPv6;
    if let Some(prefix) = new.remote_ip_prefix
        && matches!(prefix, IpNet::V6(_)) != ipv6
    {
        let family = new.ethertype.as_str();
        return Err(Rejection::new(
            RejectionKind::Invalid,
            "security group rule",
            &new.id,
            format!("Conflicting value ethertype {family} for CIDR {prefix}"),
        ));
    }
    let number = match &new.protocol {
        None => None,
        Some(name) => match protocol::number(name, ipv6) {
            None => {
                return invalid(format!(
                    "Security group rule protocol {name} not supported. Only protocol names and integer representations [0 to 255] are supported."
                ));
            }
            number => number,
        },
    };
    let (min, max) = (new.port_range_min, new.port_range_max);
    match number {
        _ if min.is_none() && max.is_none() => Ok(()),
        None => invalid("Must also specify protocol if port range is given.".into()),
        Some(1 | 58) => match (min, max) {
            (None, Some(_)) => {
                invalid("ICMP code (port-range-max) needs ICMP type (port-range-min).".into())
            }
            (Some(kind), code) if kind > 255 || code.is_some_and(|code| code > 255) => {
                invalid("Invalid value for ICMP type or code: it must be 0 to 255.".into())
            }
            _ => Ok(()),
        },
        Some(number) if WITH_PORTS.contains(&number) => match (min, max) {
            (Some(min), Some(max)) if 0 < min && min <= max => Ok(()),
            _ => invalid(
                "For TCP/UDP protocols, port_range_min must be <= port_range_max and both given."
                    .into(),
            ),
        },
        Some(_) => invalid("This protocol has no ports.".into()),
    }
}
