//! `POST /v2.1/servers`: from what a client sends to the command that makes servers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::HeaderValue;
use http::header::LOCATION;
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::body::{Body, Json, lenient_bool, lenient_u64};
use super::super::context::Context;
use super::super::error::{ApiError, ErrorKind};
use super::super::{image, policy};
use super::{check_name, flavors, propose_new};
use crate::ids::{ImageId, NetworkId, PortId, ProjectId, SecurityGroupId, ServerGroupId, ServerId};
use crate::seal::Sealed;
use crate::state::Command;
use crate::state::compute::{ComputeCommand, NewServer, NewServerPort, PortSource};
use crate::state::network::{NetworkCommand, SecurityGroup};

/// The longest user data, as base64.
const USER_DATA_BYTES_MAX: usize = 65_535;
/// How many servers one request makes.
const SERVERS_PER_REQUEST_MAX: u64 = 100;
const TAGS_MAX: usize = 50;
const TAG_CHARS_MAX: usize = 60;
const HOSTNAME_CHARS_MAX: usize = 63;

#[derive(Deserialize)]
pub(super) struct CreateRequest {
    server: ServerFields,
    #[serde(default, rename = "os:scheduler_hints", alias = "OS-SCH-HNT:scheduler_hints")]
    hints: Option<Hints>,
}

#[derive(Deserialize)]
struct ServerFields {
    name: String,
    #[serde(rename = "imageRef")]
    image: Option<String>,
    #[serde(rename = "flavorRef")]
    flavor: Value,
    metadata: Option<BTreeMap<String, String>>,
    networks: Option<Networks>,
    key_name: Option<String>,
    security_groups: Option<Vec<Named>>,
    user_data: Option<String>,
    #[serde(default, deserialize_with = "lenient_bool")]
    config_drive: Option<bool>,
    availability_zone: Option<String>,
    #[serde(default, deserialize_with = "lenient_u64")]
    min_count: Option<u64>,
    #[serde(default, deserialize_with = "lenient_u64")]
    max_count: Option<u64>,
    block_device_mapping_v2: Option<Vec<BlockDevice>>,
    block_device_mapping: Option<Vec<Value>>,
    personality: Option<Vec<Value>>,
    description: Option<String>,
    tags: Option<BTreeSet<String>>,
    hostname: Option<String>,
    host: Option<String>,
    hypervisor_hostname: Option<String>,
    #[serde(default, deserialize_with = "lenient_bool")]
    return_reservation_id: Option<bool>,
}

#[derive(Deserialize)]
struct Named {
    name: String,
}

#[derive(Deserialize)]
struct Hints {
    group: Option<Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Networks {
    Word(String),
    List(Vec<NetworkFields>),
}

#[derive(Deserialize)]
struct NetworkFields {
    uuid: Option<String>,
    port: Option<String>,
    fixed_ip: Option<String>,
    tag: Option<String>,
}

#[derive(Deserialize)]
struct BlockDevice {
    uuid: Option<String>,
    source_type: Option<String>,
    destination_type: Option<String>,
    boot_index: Option<Value>,
}

fn bad(message: impl Into<String>) -> ApiError {
    ApiError::bad_request(message)
}

/// The image: named by `imageRef`, with a block device list that says the same or nothing.
fn image(ctx: &Context, fields: &ServerFields) -> Result<ImageId, ApiError> {
    if fields.block_device_mapping.as_ref().is_some_and(|list| !list.is_empty()) {
        return Err(bad("block_device_mapping is not supported: use an image."));
    }
    let mut named = fields.image.as_deref().filter(|id| !id.is_empty());
    for device in fields.block_device_mapping_v2.iter().flatten() {
        let source = device.source_type.as_deref().unwrap_or_default();
        let destination = device.destination_type.as_deref().unwrap_or("local");
        let boots = matches!(&device.boot_index, Some(index) if index == 0 || index == "0");
        if source != "image" || destination != "local" || !boots {
            return Err(bad(format!(
                "Block Device Mapping is Invalid: a server boots from an image on a local disk; \
                 source_type {source} with destination_type {destination} is not supported."
            )));
        }
        if device.uuid.as_deref() != named.or(device.uuid.as_deref()) {
            return Err(bad("Block Device Mapping is Invalid: it names another image."));
        }
        named = device.uuid.as_deref();
    }
    let id = named.ok_or_else(|| bad("Invalid imageRef provided."))?;
    let image =
        image::find(ctx, id).map_err(|_| bad(format!("Can not find requested image {id}.")))?;
    Ok(image.id.clone())
}

/// The networks of the project: its own and shared ones.
fn available(ctx: &Context, project: &ProjectId) -> Vec<NetworkId> {
    let networks = ctx.state.network.networks.values();
    networks
        .filter(|network| !network.external && (network.project_id == *project || network.shared))
        .map(|network| network.id.clone())
        .collect()
}

fn new_port(ctx: &Context, network_id: NetworkId) -> NewServerPort {
    let source = PortSource::New { network_id, fixed_ip: None };
    NewServerPort { port_id: PortId::from(ctx.mint()), source, tag: None }
}

/// The only network that it can be; none for a project without networks where that is
/// allowed.
fn only_network(
    ctx: &Context,
    project: &ProjectId,
    required: bool,
) -> Result<Vec<NewServerPort>, ApiError> {
    match available(ctx, project).as_slice() {
        [] if required => Err(bad("Unable to automatically allocate a network for the project.")),
        [] => Ok(Vec::new()),
        [one] => Ok(vec![new_port(ctx, one.clone())]),
        _ => Err(ApiError::conflict(
            "Multiple possible networks found, use a Network ID to be more specific.",
        )),
    }
}

fn networks(
    ctx: &Context,
    project: &ProjectId,
    asked: Option<&Networks>,
) -> Result<Vec<NewServerPort>, ApiError> {
    match asked {
        None if ctx.at_least(2, 37) => {
            Err(bad("Invalid input for field/attribute server. 'networks' is a required property"))
        }
        None => only_network(ctx, project, false),
        Some(Networks::List(list)) if list.is_empty() => only_network(ctx, project, false),
        Some(Networks::List(list)) => {
            list.iter().map(|network| one_network(ctx, project, network)).collect()
        }
        Some(Networks::Word(word)) if ctx.at_least(2, 37) && word == "none" => Ok(Vec::new()),
        Some(Networks::Word(word)) if ctx.at_least(2, 37) && word == "auto" => {
            only_network(ctx, project, true)
        }
        Some(Networks::Word(word)) => {
            Err(bad(format!("Invalid input for field/attribute networks. Value: {word}.")))
        }
    }
}

fn one_network(
    ctx: &Context,
    project: &ProjectId,
    asked: &NetworkFields,
) -> Result<NewServerPort, ApiError> {
    let tag = asked.tag.clone();
    if let Some(port) = asked.port.as_deref().filter(|port| !port.is_empty()) {
        let port = ctx.state.network.ports.get(port).filter(|port| ctx.sees(&port.project_id));
        let port = port.ok_or_else(|| bad("The port of the request could not be found."))?;
        return Ok(NewServerPort { port_id: port.id.clone(), source: PortSource::Existing, tag });
    }
    let id = asked.uuid.as_deref().ok_or_else(|| bad("A network is named by uuid or port."))?;
    let network = ctx.state.network.networks.get(id);
    let network = network
        .filter(|network| {
            ctx.sees(&network.project_id)
                || network.project_id == *project
                || network.shared
                || network.external
        })
        .ok_or_else(|| bad(format!("Network {id} could not be found.")))?;
    if network.external {
        return Err(ApiError::forbidden(format!(
            "It is not allowed to create an interface on external network {id}"
        )));
    }
    let fixed_ip = asked
        .fixed_ip
        .as_deref()
        .map(|text| text.parse::<IpAddr>().map_err(|_| bad(format!("Invalid fixed_ip {text}."))))
        .transpose()?;
    let source = PortSource::New { network_id: network.id.clone(), fixed_ip };
    Ok(NewServerPort { port_id: PortId::from(ctx.mint()), source, tag })
}

/// The security groups by name or id. The project's default group is made when it is
/// named and isn't there yet.
async fn security_groups(
    ctx: &Context,
    project: &ProjectId,
    named: Option<&Vec<Named>>,
) -> Result<Vec<SecurityGroupId>, ApiError> {
    let mut state = ctx.state.clone();
    let mut ids = BTreeSet::new();
    for Named { name } in named.into_iter().flatten() {
        let is_named = |group: &&SecurityGroup| {
            group.project_id == *project && (group.name == *name || group.id.as_str() == name)
        };
        let missing = !state.network.security_groups.values().any(|group| is_named(&group));
        if missing && name == "default" {
            let command = NetworkCommand::EnsureDefaultGroup(project.clone());
            ctx.propose(Command::Network(command)).await?;
            state = ctx.fresh().await?;
        }
        let groups: Vec<_> = state.network.security_groups.values().filter(is_named).collect();
        match groups.as_slice() {
            [one] => ids.insert(one.id.clone()),
            [] => {
                return Err(bad(format!("Unable to find security_group with name or id '{name}'")));
            }
            _ => {
                return Err(ApiError::conflict(format!(
                    "Multiple security_group matches found for name '{name}', use an ID to be \
                     more specific."
                )));
            }
        };
    }
    Ok(ids.into_iter().collect())
}

fn user_data(ctx: &Context, given: Option<&String>) -> Result<Option<Sealed>, ApiError> {
    let Some(text) = given else { return Ok(None) };
    if text.len() > USER_DATA_BYTES_MAX {
        return Err(bad(format!("user_data may have at most {USER_DATA_BYTES_MAX} characters.")));
    }
    let packed: String = text.split_whitespace().collect();
    let bytes = STANDARD.decode(packed).map_err(|_| bad("user_data is not valid base64."))?;
    Ok(Some(ctx.cloud().sealer().seal(&bytes)))
}

/// The zone and, from an administrator, the host: `zone`, `zone:host` or `:host`.
fn placement(
    ctx: &Context,
    fields: &ServerFields,
) -> Result<(Option<String>, Option<String>), ApiError> {
    let mut host = None;
    for named in [&fields.host, &fields.hypervisor_hostname].into_iter().flatten() {
        ctx.require_version(2, 74)?;
        ctx.require_admin("compute:servers:create:requested_destination")?;
        host = Some(named.clone());
    }
    let mut zone = fields.availability_zone.clone().filter(|zone| !zone.is_empty());
    if let Some((name, forced)) = zone.as_ref().and_then(|zone| zone.split_once(':')) {
        ctx.require_admin("os_compute_api:servers:create:forced_host")?;
        let forced = forced.split(':').find(|part| !part.is_empty()).map(str::to_owned);
        (host, zone) = (forced, Some(name.to_owned()).filter(|name| !name.is_empty()));
    }
    let mut hosts = ctx.state.cluster.hosts.values();
    if let Some(zone) = &zone
        && !hosts.any(|host| host.availability_zone == *zone)
    {
        return Err(bad("The requested availability zone is not available"));
    }
    let mut hosts = ctx.state.cluster.hosts.values();
    if let Some(name) = &host
        && !hosts.any(|host| host.name == *name)
    {
        return Err(bad(format!("Compute host {name} could not be found.")));
    }
    Ok((zone, host))
}

fn group(ctx: &Context, hints: Option<&Hints>) -> Result<Option<ServerGroupId>, ApiError> {
    let id = match hints.and_then(|hints| hints.group.as_ref()) {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(id)) => id.as_str(),
        Some(Value::Array(ids)) => ids.first().and_then(Value::as_str).unwrap_or_default(),
        Some(_) => return Err(bad("Server group scheduler hint must be a UUID.")),
    };
    let group = ctx.state.compute.groups.get(id).filter(|group| ctx.sees(&group.project_id));
    let group = group.ok_or_else(|| bad(format!("Instance group {id} could not be found.")))?;
    Ok(Some(group.id.clone()))
}

/// A host name for the guest, made of the server's name as Nova makes it.
fn hostname_of(name: &str, id: &ServerId) -> String {
    let kept: String = name
        .to_lowercase()
        .chars()
        .map(|c| if matches!(c, ' ' | '_' | '.') { '-' } else { c })
        .filter(|c| c.is_ascii_alphanumeric() || *c == '-')
        .take(HOSTNAME_CHARS_MAX)
        .collect();
    let kept = kept.trim_matches('-');
    if kept.is_empty() { format!("server-{id}") } else { kept.to_owned() }
}

/// Checks a host name that a client chose.
pub(super) fn check_hostname(ctx: &Context, name: &str) -> Result<(), ApiError> {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= HOSTNAME_CHARS_MAX
            && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let good = match ctx.at_least(2, 94) {
        true => name.len() <= 255 && name.split('.').all(label),
        false => label(name),
    };
    if good { Ok(()) } else { Err(bad(format!("{name:?} is not a host name."))) }
}

pub(super) fn check_tags(tags: &BTreeSet<String>) -> Result<(), ApiError> {
    let good = |tag: &String| {
        !tag.is_empty() && tag.chars().count() <= TAG_CHARS_MAX && !tag.contains([',', '/'])
    };
    if tags.len() <= TAGS_MAX && tags.iter().all(good) {
        return Ok(());
    }
    Err(bad(format!(
        "A server has at most {TAGS_MAX} tags of 1 to {TAG_CHARS_MAX} characters without ',' and '/'."
    )))
}

pub(super) fn check_metadata(metadata: &BTreeMap<String, String>) -> Result<(), ApiError> {
    let good = |(key, value): (&String, &String)| {
        !key.is_empty() && key.chars().count() <= 255 && value.chars().count() <= 255
    };
    if metadata.iter().all(good) {
        return Ok(());
    }
    Err(bad("Metadata keys have 1 to 255 characters and values at most 255."))
}

fn counts(fields: &ServerFields) -> Result<(u64, u64), ApiError> {
    let min = fields.min_count.unwrap_or(1);
    let max = fields.max_count.unwrap_or(min);
    if min == 0 || max == 0 || min > max {
        return Err(bad("min_count must be <= max_count, and both at least 1."));
    }
    if max > SERVERS_PER_REQUEST_MAX {
        return Err(bad(format!("One request makes at most {SERVERS_PER_REQUEST_MAX} servers.")));
    }
    Ok((min, max))
}

fn check_fields(ctx: &Context, fields: &ServerFields) -> Result<(), ApiError> {
    check_name("name", &fields.name)?;
    if fields.personality.as_ref().is_some_and(|files| !files.is_empty()) {
        return Err(bad("personality is not supported: use user_data."));
    }
    if let Some(hostname) = &fields.hostname {
        if !ctx.at_least(2, 90) {
            return Err(bad("hostname needs microversion 2.90."));
        }
        check_hostname(ctx, hostname)?;
    }
    if let Some(tags) = &fields.tags {
        if !ctx.at_least(2, 52) {
            return Err(bad("tags need microversion 2.52."));
        }
        check_tags(tags)?;
    }
    check_metadata(fields.metadata.as_ref().unwrap_or(&BTreeMap::new()))
}

/// What the request asks for, as the first server's command.
async fn validated(ctx: &Context, request: &CreateRequest) -> Result<NewServer, ApiError> {
    let fields = &request.server;
    check_fields(ctx, fields)?;
    let project_id = ctx.project_id()?;
    let flavor = match &fields.flavor {
        Value::String(id) => id.rsplit('/').next().unwrap_or_default().to_owned(),
        Value::Number(id) => id.to_string(),
        _ => return Err(bad("Invalid flavorRef provided.")),
    };
    let flavor = flavors::find(ctx, &flavor)
        .map_err(|_| bad(format!("Flavor {flavor} could not be found.")))?;
    let (availability_zone, requested_host) = placement(ctx, fields)?;
    let id = ServerId::from(ctx.mint());
    Ok(NewServer {
        name: fields.name.trim().to_owned(),
        user_id: ctx.user_id(),
        description: fields.description.clone().filter(|_| ctx.at_least(2, 19)),
        image_id: image(ctx, fields)?,
        flavor_id: flavor.id.clone(),
        key_name: fields.key_name.clone(),
        metadata: fields.metadata.clone().unwrap_or_default(),
        tags: fields.tags.clone().unwrap_or_default(),
        config_drive: fields.config_drive.unwrap_or(false),
        user_data: user_data(ctx, fields.user_data.as_ref())?,
        availability_zone,
        requested_host,
        group_id: group(ctx, request.hints.as_ref())?,
        hostname: fields.hostname.clone().unwrap_or_else(|| hostname_of(&fields.name, &id)),
        reservation_id: format!("r-{}", &ctx.mint().replace('-', "")[..8]),
        launch_index: 0,
        networks: networks(ctx, &project_id, fields.networks.as_ref())?,
        security_groups: security_groups(ctx, &project_id, fields.security_groups.as_ref()).await?,
        placement: None,
        project_id,
        id,
    })
}

/// The server number `index` of a request for several.
fn numbered(ctx: &Context, first: &NewServer, index: u64) -> NewServer {
    let mut server = first.clone();
    server.launch_index = u32::try_from(index).unwrap_or(u32::MAX);
    server.name = format!("{}-{}", first.name, index + 1);
    server.hostname = format!("{}-{}", first.hostname, index + 1);
    server.id = ServerId::from(ctx.mint());
    for port in &mut server.networks {
        if matches!(port.source, PortSource::New { .. }) {
            port.port_id = PortId::from(ctx.mint());
        }
    }
    server
}

/// Makes at least `min` and at most `max` servers, or none.
async fn make(
    ctx: &Context,
    first: NewServer,
    (min, max): (u64, u64),
) -> Result<ServerId, ApiError> {
    if max == 1 {
        let id = first.id.clone();
        propose_new(ctx, ComputeCommand::CreateServer(Box::new(first))).await?;
        return Ok(id);
    }
    if first.networks.iter().any(|port| port.source == PortSource::Existing) {
        return Err(bad("A port is given to one server only."));
    }
    let mut made: Vec<ServerId> = Vec::new();
    for index in 0..max {
        let server = numbered(ctx, &first, index);
        let id = server.id.clone();
        match propose_new(ctx, ComputeCommand::CreateServer(Box::new(server))).await {
            Ok(_) => made.push(id),
            Err(error) if error.kind == ErrorKind::QuotaExceeded && index >= min => break,
            Err(error) => {
                for id in made {
                    let command = Command::Compute(ComputeCommand::DeleteServer(id));
                    ctx.propose(command).await?;
                }
                return Err(error);
            }
        }
    }
    made.into_iter().next().ok_or_else(|| bad("No server was asked for."))
}

pub(super) async fn create(
    ctx: Context,
    Body(request): Body<CreateRequest>,
) -> Result<Response, ApiError> {
    let counts = counts(&request.server)?;
    let server = validated(&ctx, &request).await?;
    let reservation_id = server.reservation_id.clone();
    tracing::debug!(
        request_id = %ctx.edge.request_id, action = policy::SERVER_CREATE.name,
        %reservation_id, "creating servers"
    );
    let id = make(&ctx, server, counts).await?;
    if request.server.return_reservation_id == Some(true) {
        return Ok(Json::accepted(json!({"reservation_id": reservation_id})).into_response());
    }
    let groups = request.server.security_groups.as_deref().unwrap_or_default();
    let groups: Vec<Value> = match groups {
        [] => vec![json!({"name": "default"})],
        named => named.iter().map(|group| json!({"name": group.name})).collect(),
    };
    let url = ctx.url(&format!("/compute/v2.1/servers/{id}"));
    let mut response = Json::accepted(json!({"server": {
        "id": id,
        "links": [
            {"rel": "self", "href": url},
            {"rel": "bookmark", "href": ctx.url(&format!("/compute/servers/{id}"))},
        ],
        "OS-DCF:diskConfig": "MANUAL",
        "security_groups": groups,
    }}))
    .into_response();
    if let Ok(location) = HeaderValue::from_str(&url) {
        response.headers_mut().insert(LOCATION, location);
    }
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn makes_host_names_of_any_name() {
        let id = ServerId::from("1");
        assert_eq!(hostname_of("My Web_Server.1!", &id), "my-web-server-1");
        assert_eq!(hostname_of("日本", &id), "server-1");
        assert_eq!(hostname_of(&"a".repeat(300), &id).len(), HOSTNAME_CHARS_MAX);
    }
}
