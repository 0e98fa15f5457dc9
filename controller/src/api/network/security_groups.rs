//! `/v2.0/security-groups` and `/v2.0/security-group-rules`.

use axum::extract::Path;
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::list;
use super::subnets::range;
use crate::api::body::{Body, Json};
use crate::api::context::Context;
use crate::api::error::{ApiError, ErrorKind};
use crate::api::routes::Routes;
use crate::api::{policy, time};
use crate::ids::{SecurityGroupId, SecurityGroupRuleId};
use crate::plan::protocol;
use crate::state::network::{
    Direction, Ethertype, NetworkCommand, NewRule, SecurityGroup, SecurityGroupRule,
};
use crate::state::{Command, Outcome};

pub(super) fn routes() -> Routes {
    Routes::new(super::PREFIX)
        .get("/v2.0/security-groups", policy::SECURITY_GROUP_LIST, list)
        .post("/v2.0/security-groups", policy::SECURITY_GROUP_CREATE, create)
        .get("/v2.0/security-groups/{id}", policy::SECURITY_GROUP_GET, show)
        .put("/v2.0/security-groups/{id}", policy::SECURITY_GROUP_UPDATE, update)
        .delete("/v2.0/security-groups/{id}", policy::SECURITY_GROUP_DELETE, delete)
        .get("/v2.0/security-group-rules", policy::SECURITY_RULE_LIST, list_rules)
        .post("/v2.0/security-group-rules", policy::SECURITY_RULE_CREATE, create_rule)
        .get("/v2.0/security-group-rules/{id}", policy::SECURITY_RULE_GET, show_rule)
        .delete("/v2.0/security-group-rules/{id}", policy::SECURITY_RULE_DELETE, delete_rule)
}

/// The group, if it is the caller's to see.
pub(super) fn find<'a>(ctx: &'a Context, id: &str) -> Result<&'a SecurityGroup, ApiError> {
    let found = ctx.state.network.security_groups.get(id);
    found
        .filter(|group| ctx.sees(&group.project_id))
        .ok_or_else(|| ApiError::not_found("security_group", id))
}

fn view(group: &SecurityGroup) -> Value {
    json!({
        "id": group.id,
        "name": group.name,
        "description": group.description,
        "stateful": group.stateful,
        "project_id": group.project_id,
        "tenant_id": group.project_id,
        "shared": false,
        "security_group_rules": group.rules.values().map(rule_view).collect::<Vec<_>>(),
        "tags": group.tags,
        "revision_number": group.revision_number,
        "created_at": time::seconds(group.created_ms),
        "updated_at": time::seconds(group.updated_ms),
    })
}

fn rule_view(rule: &SecurityGroupRule) -> Value {
    json!({
        "id": rule.id,
        "security_group_id": rule.security_group_id,
        "project_id": rule.project_id,
        "tenant_id": rule.project_id,
        "description": rule.description,
        "direction": rule.direction.as_str(),
        "ethertype": rule.ethertype.as_str(),
        "protocol": rule.protocol,
        "port_range_min": rule.port_range_min,
        "port_range_max": rule.port_range_max,
        "remote_ip_prefix": rule.remote_ip_prefix.map(|prefix| prefix.to_string()),
        "remote_group_id": rule.remote_group_id,
        "remote_address_group_id": null,
        "normalized_cidr": rule.remote_ip_prefix.map(|prefix| prefix.trunc().to_string()),
        "tags": [],
        "revision_number": rule.revision_number,
        "created_at": time::seconds(rule.created_ms),
        "updated_at": time::seconds(rule.created_ms),
    })
}

/// A project has its default group from the first time it looks.
async fn with_default_group(mut ctx: Context) -> Result<Context, ApiError> {
    let Ok(project) = ctx.project_id() else { return Ok(ctx) };
    let groups = &ctx.state.network.security_groups;
    if !groups.values().any(|group| group.project_id == project && group.name == "default") {
        ctx.propose(Command::Network(NetworkCommand::EnsureDefaultGroup(project))).await?;
        ctx.state = ctx.fresh().await?;
    }
    Ok(ctx)
}

async fn list(ctx: Context) -> Result<Json, ApiError> {
    let ctx = with_default_group(ctx).await?;
    let groups = ctx.state.network.security_groups.values();
    let groups = groups.filter(|group| ctx.sees(&group.project_id));
    list::list(&ctx, "security_groups", groups.map(view).collect())
}

async fn show(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    let group = view(find(&ctx, &id)?);
    Ok(list::show(&ctx, "security_group", group))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Create {
    security_group: CreateGroup,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CreateGroup {
    name: String,
    description: Option<String>,
    stateful: Option<bool>,
    project_id: Option<String>,
    tenant_id: Option<String>,
}

async fn create(ctx: Context, Body(body): Body<Create>) -> Result<Json, ApiError> {
    let ctx = with_default_group(ctx).await?;
    let asked = body.security_group;
    if asked.stateful == Some(false) {
        return Err(ApiError::bad_request("stateful is false; every group tracks connections."));
    }
    let command = NetworkCommand::CreateSecurityGroup {
        id: SecurityGroupId::from(ctx.mint()),
        project_id: super::project_of(&ctx, asked.project_id, asked.tenant_id)?,
        name: asked.name,
        description: asked.description.unwrap_or_default(),
        stateful: true,
        tags: Default::default(),
    };
    let group = changed(&ctx, command).await?;
    Ok(Json::created(json!({"security_group": group})))
}

async fn changed(ctx: &Context, command: NetworkCommand) -> Result<Value, ApiError> {
    match ctx.propose(Command::Network(command)).await? {
        Outcome::SecurityGroup(group) => Ok(view(&group)),
        Outcome::SecurityGroupRule(rule) => Ok(rule_view(&rule)),
        other => {
            Err(ApiError::new(ErrorKind::Internal, format!("{other:?} is no security group.")))
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Update {
    security_group: UpdateGroup,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct UpdateGroup {
    name: Option<String>,
    description: Option<String>,
}

async fn update(
    ctx: Context,
    Path(id): Path<String>,
    Body(body): Body<Update>,
) -> Result<Json, ApiError> {
    let id = find(&ctx, &id)?.id.clone();
    let UpdateGroup { name, description } = body.security_group;
    let command = NetworkCommand::UpdateSecurityGroup { id, name, description, tags: None };
    let group = changed(&ctx, command).await?;
    Ok(Json::ok(json!({"security_group": group})))
}

async fn delete(ctx: Context, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let id = find(&ctx, &id)?.id.clone();
    ctx.propose(Command::Network(NetworkCommand::DeleteSecurityGroup(id))).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn find_rule<'a>(ctx: &'a Context, id: &str) -> Result<&'a SecurityGroupRule, ApiError> {
    let groups = ctx.state.network.security_groups.values();
    groups
        .filter(|group| ctx.sees(&group.project_id))
        .find_map(|group| group.rules.get(id))
        .ok_or_else(|| ApiError::not_found("security_group_rule", id))
}

async fn list_rules(ctx: Context) -> Result<Json, ApiError> {
    let ctx = with_default_group(ctx).await?;
    let groups = ctx.state.network.security_groups.values();
    let groups = groups.filter(|group| ctx.sees(&group.project_id));
    let rules = groups.flat_map(|group| group.rules.values()).map(rule_view).collect();
    list::list(&ctx, "security_group_rules", rules)
}

async fn show_rule(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    let rule = rule_view(find_rule(&ctx, &id)?);
    Ok(list::show(&ctx, "security_group_rule", rule))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CreateRuleBody {
    security_group_rule: CreateRule,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CreateRule {
    security_group_id: String,
    direction: String,
    ethertype: Option<String>,
    protocol: Option<Value>,
    port_range_min: Option<u16>,
    port_range_max: Option<u16>,
    remote_ip_prefix: Option<String>,
    remote_group_id: Option<String>,
    description: Option<String>,
    // The rule belongs to its group's project, whatever is said here.
    #[serde(rename = "project_id")]
    _project_id: Option<String>,
    #[serde(rename = "tenant_id")]
    _tenant_id: Option<String>,
}

fn direction(text: &str) -> Result<Direction, ApiError> {
    match text {
        "ingress" => Ok(Direction::Ingress),
        "egress" => Ok(Direction::Egress),
        _ => Err(ApiError::bad_request(format!(
            "Invalid input for direction. Reason: '{text}' is not in ['ingress', 'egress']."
        ))),
    }
}

fn ethertype(text: &str) -> Result<Ethertype, ApiError> {
    match text {
        _ if text.eq_ignore_ascii_case("IPv4") => Ok(Ethertype::IPv4),
        _ if text.eq_ignore_ascii_case("IPv6") => Ok(Ethertype::IPv6),
        _ => Err(ApiError::bad_request(format!(
            "Invalid input for ethertype. Reason: '{text}' is not in ['IPv4', 'IPv6']."
        ))),
    }
}

/// A protocol by name or number; `any` and `null` mean every protocol.
fn protocol_of(asked: Option<Value>, ethertype: Ethertype) -> Result<Option<String>, ApiError> {
    let name = match asked {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(name)) if name == "any" || name.is_empty() => return Ok(None),
        Some(Value::String(name)) => name.to_ascii_lowercase(),
        Some(other) => other.to_string(),
    };
    if protocol::number(&name, ethertype == Ethertype::IPv6).is_none() {
        return Err(ApiError::bad_request(format!(
            "Security group rule protocol {name} not supported. Only protocol names and integer \
             representations [0 to 255] are."
        )));
    }
    Ok(Some(name))
}

async fn create_rule(ctx: Context, Body(body): Body<CreateRuleBody>) -> Result<Json, ApiError> {
    let asked = body.security_group_rule;
    let group = find(&ctx, &asked.security_group_id)?.id.clone();
    let remote_group_id = asked.remote_group_id.filter(|id| !id.is_empty());
    let remote_group_id = match remote_group_id {
        Some(id) => Some(find(&ctx, &id)?.id.clone()),
        None => None,
    };
    let ethertype = ethertype(asked.ethertype.as_deref().unwrap_or("IPv4"))?;
    let prefix = asked.remote_ip_prefix.filter(|prefix| !prefix.is_empty());
    let command = NetworkCommand::CreateSecurityGroupRule(Box::new(NewRule {
        id: SecurityGroupRuleId::from(ctx.mint()),
        security_group_id: group,
        description: asked.description.unwrap_or_default(),
        direction: direction(&asked.direction)?,
        ethertype,
        protocol: protocol_of(asked.protocol, ethertype)?,
        port_range_min: asked.port_range_min,
        port_range_max: asked.port_range_max,
        remote_ip_prefix: prefix.map(|p| range("remote_ip_prefix", &p)).transpose()?,
        remote_group_id,
    }));
    let rule = changed(&ctx, command).await?;
    Ok(Json::created(json!({"security_group_rule": rule})))
}

async fn delete_rule(ctx: Context, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let id = find_rule(&ctx, &id)?.id.clone();
    ctx.propose(Command::Network(NetworkCommand::DeleteSecurityGroupRule(id))).await?;
    Ok(StatusCode::NO_CONTENT)
}
