//! `/v2.1/os-keypairs`. Private halves are made by clients and never come here.

use axum::extract::Path;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::StatusCode;
use md5::{Digest, Md5};
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::body::{Body, Json};
use super::super::context::Context;
use super::super::error::ApiError;
use super::super::routes::Routes;
use super::super::{policy, time, unexpected};
use crate::ids::UserId;
use crate::state::compute::{ComputeCommand, Keypair};
use crate::state::{Command, Outcome};

const PUBLIC_KEY_BYTES_MAX: usize = 16 * 1024;

pub(super) fn routes() -> Routes {
    Routes::new(super::PREFIX)
        .get("/v2.1/os-keypairs", policy::KEYPAIR_LIST, list)
        .post("/v2.1/os-keypairs", policy::KEYPAIR_CREATE, create)
        .get("/v2.1/os-keypairs/{name}", policy::KEYPAIR_GET, show)
        .delete("/v2.1/os-keypairs/{name}", policy::KEYPAIR_DELETE, remove)
}

#[derive(Deserialize)]
struct CreateRequest {
    keypair: KeypairFields,
}

#[derive(Deserialize)]
struct KeypairFields {
    name: String,
    public_key: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
    user_id: Option<String>,
}

/// Whose keypairs: the caller's, or from 2.10 on another user's for an administrator.
fn owner(ctx: &Context, named: Option<&str>) -> Result<UserId, ApiError> {
    match named {
        Some(user) if ctx.at_least(2, 10) && user != ctx.caller.user.id.as_str() => {
            ctx.require_admin(policy::KEYPAIR_GET.name)?;
            Ok(UserId::from(user))
        }
        _ => Ok(ctx.user_id()),
    }
}

fn keypair_view(ctx: &Context, keypair: &Keypair) -> Value {
    let mut view = json!({
        "name": keypair.name, "public_key": keypair.public_key,
        "fingerprint": keypair.fingerprint,
    });
    if ctx.at_least(2, 2) {
        view["type"] = json!(keypair.kind);
    }
    view
}

async fn list(ctx: Context) -> Result<Json, ApiError> {
    let owner = owner(&ctx, ctx.query.get("user_id"))?;
    let keypairs = ctx.state.compute.keypairs.range((owner.clone(), String::new())..);
    let keypairs: Vec<&Keypair> =
        keypairs.take_while(|((user, _), _)| *user == owner).map(|(_, keypair)| keypair).collect();
    let slice = ctx.query.page()?.cut(keypairs, |keypair| &keypair.name)?;
    let views = slice.items.iter().map(|keypair| json!({"keypair": keypair_view(&ctx, keypair)}));
    let mut body = json!({"keypairs": views.collect::<Vec<_>>()});
    if let Some(links) = slice.links(&ctx.self_url(), &ctx.query) {
        body["keypairs_links"] = links;
    }
    Ok(Json::ok(body))
}

async fn show(ctx: Context, Path(name): Path<String>) -> Result<Json, ApiError> {
    let owner = owner(&ctx, ctx.query.get("user_id"))?;
    let keypair = ctx.state.compute.keypairs.get(&(owner, name.clone()));
    let keypair = keypair.ok_or_else(|| ApiError::not_found("keypair", &name))?;
    let mut view = keypair_view(&ctx, keypair);
    view["user_id"] = json!(keypair.user_id);
    view["id"] = json!(0);
    view["created_at"] = json!(time::micros_naive(keypair.created_ms));
    view["updated_at"] = Value::Null;
    view["deleted_at"] = Value::Null;
    view["deleted"] = json!(false);
    Ok(Json::ok(json!({"keypair": view})))
}

/// The MD5 fingerprint of an OpenSSH public key, in colon form.
fn fingerprint(public_key: &str) -> Option<String> {
    let mut words = public_key.split_whitespace();
    let algorithm = words.next()?;
    let blob = STANDARD.decode(words.next()?).ok()?;
    // The blob begins with the algorithm's name again, after its length.
    let length = u32::from_be_bytes(blob.get(..4)?.try_into().ok()?) as usize;
    if blob.get(4..4usize.checked_add(length)?)? != algorithm.as_bytes() {
        return None;
    }
    let digest: Vec<String> = Md5::digest(&blob).iter().map(|byte| format!("{byte:02x}")).collect();
    Some(digest.join(":"))
}

async fn create(ctx: Context, Body(request): Body<CreateRequest>) -> Result<Json, ApiError> {
    let fields = request.keypair;
    super::check_name("name", &fields.name)?;
    let allowed = |c: char| c.is_ascii_alphanumeric() || "@._- ".contains(c);
    if !fields.name.chars().all(allowed) {
        let message = "A keypair's name has letters, digits, spaces and @._- only.";
        return Err(ApiError::bad_request(message));
    }
    let kind = fields.kind.unwrap_or_else(|| "ssh".to_owned());
    if kind != "ssh" {
        let message = format!("Keypairs of type {kind:?} are not supported, only ssh.");
        return Err(ApiError::bad_request(message));
    }
    let public_key = fields.public_key.ok_or_else(|| {
        ApiError::bad_request(
            "public_key is missing: keypairs are imported only, as from microversion 2.92 on.",
        )
    })?;
    let fingerprint = Some(&public_key)
        .filter(|key| key.len() <= PUBLIC_KEY_BYTES_MAX)
        .and_then(|key| fingerprint(key))
        .ok_or_else(|| {
            ApiError::bad_request("Keypair data is invalid: failed to generate fingerprint")
        })?;
    let command = ComputeCommand::CreateKeypair {
        name: fields.name,
        user_id: owner(&ctx, fields.user_id.as_deref())?,
        kind,
        public_key,
        fingerprint,
    };
    match ctx.propose(Command::Compute(command)).await? {
        Outcome::Keypair(keypair) => {
            let mut view = keypair_view(&ctx, &keypair);
            view["user_id"] = json!(keypair.user_id);
            let status = if ctx.at_least(2, 2) { StatusCode::CREATED } else { StatusCode::OK };
            Ok(Json(status, json!({"keypair": view})))
        }
        other => Err(unexpected(&other)),
    }
}

async fn remove(ctx: Context, Path(name): Path<String>) -> Result<StatusCode, ApiError> {
    let user_id = owner(&ctx, ctx.query.get("user_id"))?;
    ctx.propose(Command::Compute(ComputeCommand::DeleteKeypair { user_id, name })).await?;
    Ok(if ctx.at_least(2, 2) { StatusCode::NO_CONTENT } else { StatusCode::ACCEPTED })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprints_as_ssh_keygen_does_and_refuses_what_is_no_key() {
        let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKnkfwdHUDEM2TgqoGwsL8QRBw6q999iIB24ghp17sb2 \
                   someone@somewhere\n";
        let print = fingerprint(key).unwrap();
        assert_eq!(print.split(':').count(), 16);
        assert!(print.split(':').all(|byte| byte.len() == 2));
        for bad in
            ["", "ssh-ed25519", "ssh-rsa AAAA", "ssh-rsa !!!", "ssh-rsa AAAAC3NzaC1lZDI1NTE5"]
        {
            assert_eq!(fingerprint(bad), None, "{bad}");
        }
    }
}
