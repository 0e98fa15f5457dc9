//! The APIs from outside, over the real state machine.

mod memory;

use axum::body::Body;
use controller::api::{Rule, SubState, route_table};
use controller::ids::{HostId, ServerId};
use controller::state::Command;
use controller::state::compute::Desired;
use controller::state::image::ImageCommand;
use http::Method;
use memory::{Client, Memory, PASSWORD, credentials, in_project, tenant};
use serde_json::{Value, json};
use std::sync::Arc;

const TOKENS: &str = "/identity/v3/auth/tokens";

/// A public image, a flavor and a network with a subnet; answers their ids.
async fn furnish(admin: &Client) -> (String, String, String) {
    let body = json!({
        "name": "guest", "disk_format": "raw", "container_format": "bare", "visibility": "public",
    });
    let image = admin.post("/image/v2/images", body).await.expect(201).text("/id");
    let file = format!("/image/v2/images/{image}/file");
    let octets = "application/octet-stream";
    admin.send(Method::PUT, &file, octets, Body::from("elf")).await.expect(204);
    let body = json!({"flavor": {"name": "small", "ram": 512, "vcpus": 1, "disk": 1, "id": "1"}});
    admin.post("/compute/v2.1/flavors", body).await.expect(200);
    let body = json!({"network": {"name": "net", "shared": true}});
    let network = admin.post("/networking/v2.0/networks", body).await.expect(201);
    let network = network.text("/network/id");
    let body = json!({"subnet": {
        "network_id": network, "cidr": "10.0.0.0/24", "ip_version": 4, "name": "sub",
    }});
    admin.post("/networking/v2.0/subnets", body).await.expect(201);
    (image, "1".to_owned(), network)
}

fn server(image: &str, flavor: &str, network: &str) -> Value {
    json!({"server": {
        "name": "one", "imageRef": image, "flavorRef": flavor,
        "networks": [{"uuid": network}], "config_drive": true, "user_data": "aGVsbG8=",
        "block_device_mapping_v2": [{
            "uuid": image, "boot_index": 0, "source_type": "image", "destination_type": "local",
            "delete_on_termination": true,
        }],
    }})
}

#[tokio::test]
async fn a_token_says_who_and_where_with_the_catalog_of_the_node_that_was_asked() {
    let memory = Memory::new();
    let client = Client::anonymous(&memory);
    let body = credentials("admin", PASSWORD, Some(in_project("admin")));
    let answer = client.post(TOKENS, body).await.expect(201);
    assert_eq!(answer.text("/token/project/name"), "admin");
    assert_eq!(answer.text("/token/methods/0"), "password");
    let catalog = answer.body["token"]["catalog"].as_array().unwrap();
    let url = |kind: &str| {
        let entry = catalog.iter().find(|entry| entry["type"] == kind).unwrap();
        entry["endpoints"][0]["url"].as_str().unwrap().to_owned()
    };
    assert_eq!(url("compute"), "https://cloud.test:8774/compute/v2.1");
    let project = answer.text("/token/project/id");
    assert_eq!(url("block-storage"), format!("https://cloud.test:8774/volume/v3/{project}"));
    assert_eq!(url("volumev3"), url("block-storage"));
    let roles = answer.body["token"]["roles"].as_array().unwrap();
    assert!(roles.iter().any(|role| role["name"] == "reader"), "implied roles are listed");
}

#[tokio::test]
async fn refuses_wrong_credentials_all_alike() {
    let memory = Memory::new();
    let client = Client::anonymous(&memory);
    for (user, password, scope) in [
        ("admin", "wrong", None),
        ("nobody", PASSWORD, None),
        ("admin", PASSWORD, Some(in_project("elsewhere"))),
        ("admin", PASSWORD, Some(json!({"domain": {"id": "none"}}))),
    ] {
        let answer = client.post(TOKENS, credentials(user, password, scope)).await.expect(401);
        assert_eq!(
            answer.text("/error/message"),
            "The request you have made requires authentication."
        );
        assert!(answer.header("www-authenticate").starts_with("Keystone uri="));
    }
}

#[tokio::test]
async fn a_token_ends_with_its_time_its_password_its_role_and_its_project() {
    let memory = Memory::new();
    let admin = Client::admin(&memory).await;
    let path = "/compute/v2.1/servers";
    let member = tenant(&memory, "alpha", "member").await;
    member.get(path).await.expect(200);
    let me = member.get("/identity/v3/auth/tokens").await;
    assert_eq!(me.status, 400, "a subject token is needed");

    let users = admin.get("/identity/v3/users?name=alpha-member").await.expect(200);
    let user = format!("/identity/v3/users/{}", users.text("/users/0/id"));
    admin.patch(&user, json!({"user": {"password": "another"}})).await.expect(200);
    member.get(path).await.expect(401);

    let member = Client::of(&memory, "alpha-member", "another", in_project("alpha")).await;
    member.get(path).await.expect(200);
    let projects = admin.get("/identity/v3/projects?name=alpha").await.expect(200);
    let project = format!("/identity/v3/projects/{}", projects.text("/projects/0/id"));
    admin.patch(&project, json!({"project": {"enabled": false}})).await.expect(200);
    member.get(path).await.expect(401);
    admin.patch(&project, json!({"project": {"enabled": true}})).await.expect(200);
    member.get(path).await.expect(401);

    let member = Client::of(&memory, "alpha-member", "another", in_project("alpha")).await;
    let assignments = admin.get("/identity/v3/role_assignments").await.expect(200);
    let assignments = assignments.body["role_assignments"].as_array().unwrap().clone();
    let own = assignments.iter().find(|one| user.ends_with(one["user"]["id"].as_str().unwrap()));
    let link = own.unwrap()["links"]["assignment"].as_str().unwrap().to_owned();
    let grant = link.strip_prefix("https://cloud.test:8774").unwrap();
    admin.delete(grant).await.expect(204);
    member.get(path).await.expect(401);

    admin.get(path).await.expect(200);
    memory.pass_time(3_600_001);
    admin.get(path).await.expect(401);
}

#[tokio::test]
async fn a_token_made_from_a_token_lives_no_longer() {
    let memory = Memory::new();
    let client = Client::admin(&memory).await;
    memory.pass_time(60_000);
    let body = json!({"auth": {
        "identity": {"methods": ["token"], "token": {"id": client.token}},
        "scope": {"system": {"all": true}},
    }});
    let answer = client.post(TOKENS, body).await.expect(201);
    assert_eq!(answer.body["token"]["system"]["all"], true);
    assert_eq!(answer.body["token"]["methods"], json!(["password", "token"]));
    memory.pass_time(3_600_000 - 60_000);
    let late = Client { token: Some(answer.header("x-subject-token").to_owned()), ..client };
    late.get("/identity/v3/users").await.expect(401);
}

fn concrete(path: &str) -> String {
    let parts = path.split('/').map(|part| if part.starts_with('{') { "x" } else { part });
    parts.collect::<Vec<_>>().join("/")
}

#[tokio::test]
async fn every_route_refuses_who_has_no_token_or_not_the_role() {
    let memory = Memory::new();
    let anonymous = Client::anonymous(&memory);
    let stranger = tenant(&memory, "beta", "service").await;
    let reader = tenant(&memory, "beta", "reader").await;
    let mut checked = 0;
    for row in route_table() {
        let Some(action) = row.action else { continue };
        let path = concrete(&format!("{}{}", row.prefix, row.path));
        let method: Method = row.method.parse().unwrap();
        let send = |client: Client| {
            let (method, path) = (method.clone(), path.clone());
            async move { client.send(method, &path, "application/json", Body::empty()).await }
        };
        let answer = send(anonymous.clone()).await;
        assert_eq!(answer.status, 401, "{method} {path} without a token");
        let wrong = match action.rule {
            Rule::Authenticated => None,
            Rule::Reader => Some(stranger.clone()),
            Rule::Member | Rule::Admin | Rule::AdminReader => Some(reader.clone()),
        };
        if let Some(wrong) = wrong {
            let answer = send(wrong).await;
            assert_eq!(answer.status, 403, "{method} {path} ({}) {}", action.name, answer.body);
            checked += 1;
        }
    }
    assert!(checked > 80, "only {checked} routes were checked");
}

#[tokio::test]
async fn errors_have_the_form_of_their_service_and_every_answer_a_request_id() {
    let memory = Memory::new();
    let admin = Client::admin(&memory).await;
    for (path, pointer) in [
        ("/compute/v2.1/servers/x", "/itemNotFound/code"),
        ("/compute/v2.1/nothing", "/itemNotFound/code"),
        ("/identity/v3/projects/x", "/error/code"),
        ("/image/v2/images/x", "/code"),
        ("/networking/v2.0/networks/x", "/NeutronError/type"),
        ("/networking/v2.0/nothing", "/NeutronError/type"),
        ("/elsewhere", "/error/code"),
    ] {
        let answer = admin.get(path).await.expect(404);
        assert!(answer.body.pointer(pointer).is_some(), "{path}: {}", answer.body);
        assert!(answer.header("x-openstack-request-id").starts_with("req-"));
    }
    let answer = admin.get("/compute/v2.1/servers/%ff").await.expect(400);
    assert_eq!(answer.body["badRequest"]["code"], 400);
    let answer = admin.delete("/compute/v2.1/servers").await.expect(405);
    assert_eq!(answer.body["badMethod"]["code"], 405);
    let answer = admin.get("/networking/v2.0/networks/x").await;
    assert_eq!(answer.text("/NeutronError/type"), "NetworkNotFound");
}

#[tokio::test]
async fn a_minority_answers_503_in_every_form() {
    let memory = Memory::new();
    let admin = Client::admin(&memory).await;
    memory.lose_quorum();
    admin.get("/healthz").await.expect(503);
    let answer = admin.get("/compute/v2.1/servers").await.expect(503);
    assert_eq!(answer.body["serviceUnavailable"]["code"], 503);
    admin.post(TOKENS, credentials("admin", PASSWORD, None)).await.expect(503);
}

#[tokio::test]
async fn negotiates_microversions() {
    let memory = Memory::new();
    let admin = Client::admin(&memory).await;
    let document = admin.get("/compute/v2.1").await.expect(200);
    let max = document.text("/version/version");
    let answer = admin.at("compute latest").get("/compute/v2.1/servers").await.expect(200);
    assert_eq!(answer.header("openstack-api-version"), format!("compute {max}"));
    assert_eq!(answer.header("x-openstack-nova-api-version"), max);
    assert!(answer.headers.get_all("vary").iter().any(|v| v == "openstack-api-version"));
    let answer = admin.at("compute 2.999").get("/compute/v2.1/servers").await.expect(406);
    assert_eq!(answer.body["computeFault"]["code"], 406);
    admin.at("compute 2.25").get("/compute/v2.1/servers/x/tags").await.expect(404);
}

#[tokio::test]
async fn hostile_bodies_are_refused_with_the_field_named() {
    let memory = Memory::new();
    let admin = Client::admin(&memory).await;
    let path = "/compute/v2.1/servers";
    let send = |body: Vec<u8>| admin.send(Method::POST, path, "application/json", Body::from(body));
    let deep = b"[".repeat(100_000);
    for body in [b"".to_vec(), b"{".to_vec(), b"\xff".to_vec(), b"{}".to_vec(), deep] {
        send(body).await.expect(400);
    }
    send(vec![b' '; 1024 * 1024 + 1]).await.expect(413);
    let answer = send(br#"{"server": {"name": 5, "flavorRef": "1"}}"#.to_vec()).await.expect(400);
    assert!(answer.text("/badRequest/message").contains("server.name"), "{}", answer.body);
}

#[tokio::test]
async fn an_image_goes_through_its_life() {
    let memory = Memory::new();
    let member = tenant(&memory, "alpha", "member").await;
    let body = json!({
        "name": "img", "disk_format": "raw", "container_format": "bare",
        "owner_specified.openstack.md5": "",
    });
    let image = member.post("/image/v2/images", body).await.expect(201);
    assert_eq!(image.text("/status"), "queued");
    assert_eq!(image.text("/visibility"), "shared");
    assert_eq!(image.text("/owner_specified.openstack.md5"), "");
    let path = format!("/image/v2/images/{}", image.text("/id"));
    let file = format!("{path}/file");
    let octets = "application/octet-stream";
    member.send(Method::GET, &file, octets, Body::empty()).await.expect(204);
    member.send(Method::PUT, &file, "text/plain", Body::from("x")).await.expect(415);
    member.send(Method::PUT, &file, octets, Body::empty()).await.expect(400);
    assert_eq!(member.get(&path).await.text("/status"), "queued", "a failed upload returns");
    member.send(Method::PUT, &file, octets, Body::from("content")).await.expect(204);
    member.send(Method::PUT, &file, octets, Body::from("again")).await.expect(409);
    let shown = member.get(&path).await.expect(200);
    assert_eq!((shown.text("/status"), shown.body["size"].as_u64()), ("active".into(), Some(7)));
    assert_eq!(member.get(&file).await.expect(200).bytes, "content");

    let patch = json!([
        {"op": "replace", "path": "/name", "value": "new"},
        {"op": "add", "path": "/os_distro", "value": "unikernel"},
        {"op": "add", "path": "/protected", "value": true},
    ]);
    let changed = member.patch(&path, patch).await.expect(200);
    assert_eq!(
        (changed.text("/name"), changed.text("/os_distro")),
        ("new".into(), "unikernel".into())
    );
    member
        .patch(&path, json!([{"op": "replace", "path": "/status", "value": "x"}]))
        .await
        .expect(403);
    member.delete(&path).await.expect(403);
    member.patch(&path, json!([{"op": "replace", "path": "/protected", "value": false}])).await;

    let other = tenant(&memory, "beta", "member").await;
    other.get(&path).await.expect(404);
    other.delete(&path).await.expect(404);
    let publicise = json!([{"op": "replace", "path": "/visibility", "value": "public"}]);
    member.patch(&path, publicise.clone()).await.expect(403);
    Client::admin(&memory).await.patch(&path, publicise).await.expect(200);
    other.get(&path).await.expect(200);
    other.delete(&path).await.expect(403);
    member.delete(&path).await.expect(204);
    member.get(&path).await.expect(404);
}

#[tokio::test]
async fn images_are_listed_filtered_sorted_and_in_pages() {
    let memory = Memory::new();
    let member = tenant(&memory, "alpha", "member").await;
    let mut ids = Vec::new();
    for name in ["b", "a", "c"] {
        let image = member.post("/image/v2/images", json!({"name": name, "tags": ["t"]})).await;
        ids.push(image.expect(201).text("/id"));
    }
    let names = |answer: memory::Answer| -> String {
        let images = answer.expect(200).body["images"].as_array().unwrap().clone();
        images.iter().map(|image| image["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(member.get("/image/v2/images").await), "cab");
    assert_eq!(names(member.get("/image/v2/images?sort=name:asc").await), "abc");
    assert_eq!(names(member.get("/image/v2/images?name=a&tag=t").await), "a");
    let query = format!("/image/v2/images?id=in:{},{}&sort_key=name&sort_dir=asc", ids[0], ids[2]);
    assert_eq!(names(member.get(&query).await), "bc");
    let first = member.get("/image/v2/images?limit=2&sort=name:asc").await.expect(200);
    let next = first.text("/next");
    assert_eq!(names(member.get(&format!("/image{next}")).await), "c");
    member.get("/image/v2/images?marker=none").await.expect(400);
    member.get("/image/v2/images?sort=colour").await.expect(400);
}

#[tokio::test]
async fn a_server_goes_through_its_life() {
    let memory = Memory::new();
    let admin = Client::admin(&memory).await.at("compute 2.96");
    let (image, flavor, network) = furnish(&admin).await;
    let member = tenant(&memory, "alpha", "member").await.at("compute 2.96");
    let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKnkfwdHUDEM2TgqoGwsL8QRBw6q999iIB24ghp17sb2 me";
    let body = json!({"keypair": {"name": "key", "public_key": key}});
    member.post("/compute/v2.1/os-keypairs", body).await.expect(201);
    let mut body = server(&image, &flavor, &network);
    body["server"]["key_name"] = json!("key");
    let created = member.post("/compute/v2.1/servers", body).await.expect(202);
    let id = created.text("/server/id");
    let path = format!("/compute/v2.1/servers/{id}");
    assert_eq!(created.header("location"), format!("https://cloud.test:8774{path}"));

    let shown = member.get(&path).await.expect(200);
    assert_eq!(shown.text("/server/status"), "BUILD");
    assert_eq!(shown.text("/server/OS-EXT-STS:task_state"), "scheduling");
    memory.reached(&id, SubState::Spawning);
    let shown = member.get(&path).await.expect(200);
    assert_eq!(shown.text("/server/OS-EXT-STS:task_state"), "spawning");

    memory.start(&id);
    let shown = member.get(&path).await.expect(200);
    let view = &shown.body["server"];
    assert_eq!(view["status"], "ACTIVE");
    assert_eq!(view["OS-EXT-STS:power_state"], 1);
    assert_eq!(view["OS-EXT-STS:task_state"], Value::Null);
    assert_eq!(view["key_name"], "key");
    assert_eq!(view["config_drive"], "True");
    assert_eq!(view["flavor"]["original_name"], "small");
    assert!(view["addresses"]["net"][0]["addr"].as_str().unwrap().starts_with("10.0.0."));
    assert_eq!(view["security_groups"], json!([{"name": "default"}]));
    assert!(view.get("OS-EXT-SRV-ATTR:host").is_none(), "tenants don't see hosts");
    let old = member.at("compute 2.1").get(&path).await.expect(200);
    assert_eq!(old.text("/server/flavor/id"), "1");
    let as_admin = admin.get(&path).await.expect(200);
    assert_eq!(as_admin.text("/server/OS-EXT-SRV-ATTR:user_data"), "aGVsbG8=");

    memory.say(&id, "one\ntwo\n");
    let action = format!("{path}/action");
    let console = member.post(&action, json!({"os-getConsoleOutput": {"length": 1}})).await;
    assert_eq!(console.expect(200).text("/output"), "two\n");
    member.post(&action, json!({"os-start": null})).await.expect(409);
    member.post(&action, json!({"dance": null})).await.expect(400);
    let reader = tenant(&memory, "alpha", "reader").await;
    reader.get(&path).await.expect(200);
    reader.post(&action, json!({"os-stop": null})).await.expect(403);
    let other = tenant(&memory, "beta", "member").await;
    other.get(&path).await.expect(404);
    other.delete(&path).await.expect(404);

    member.delete(&path).await.expect(204);
    let shown = member.get(&path).await.expect(200);
    assert_eq!(shown.text("/server/OS-EXT-STS:task_state"), "deleting");
}

#[tokio::test]
async fn a_server_that_fits_nowhere_is_in_error_and_says_why() {
    let memory = Memory::new();
    let admin = Client::admin(&memory).await;
    let (image, _, network) = furnish(&admin).await;
    let body =
        json!({"flavor": {"name": "huge", "ram": 1_000_000, "vcpus": 1, "disk": 1, "id": "9"}});
    admin.post("/compute/v2.1/flavors", body).await.expect(200);
    let created = admin.post("/compute/v2.1/servers", server(&image, "9", &network)).await;
    let path = format!("/compute/v2.1/servers/{}", created.expect(202).text("/server/id"));
    let shown = admin.get(&path).await.expect(200);
    assert_eq!(shown.text("/server/status"), "ERROR");
    assert!(shown.text("/server/fault/message").starts_with("No valid host was found."));
    let details = shown.text("/server/fault/details");
    assert!(details.contains("node1") && details.contains("node2"), "{details}");
    admin.delete(&path).await.expect(204);
    admin.get(&path).await.expect(404);
}

#[tokio::test]
async fn bad_server_requests_are_refused_and_leave_nothing() {
    let memory = Memory::new();
    let admin = Client::admin(&memory).await.at("compute 2.96");
    let (image, flavor, network) = furnish(&admin).await;
    let good = server(&image, &flavor, &network);
    let with = |key: &str, value: Value| {
        let mut body = good.clone();
        body["server"][key] = value;
        body
    };
    for (body, status) in [
        (with("imageRef", json!("none")), 400),
        (with("flavorRef", json!("none")), 400),
        (with("name", json!("")), 400),
        (with("networks", json!([{"uuid": "none"}])), 400),
        (with("networks", json!("nowhere")), 400),
        (with("networks", Value::Null), 400),
        (with("key_name", json!("none")), 400),
        (with("user_data", json!("%%%")), 400),
        (with("security_groups", json!([{"name": "none"}])), 400),
        (with("availability_zone", json!("mars")), 400),
        (with("min_count", json!(0)), 400),
        (with("max_count", json!(101)), 400),
        (with("tags", json!(["a,b"])), 400),
        (
            with(
                "block_device_mapping_v2",
                json!([{
                    "uuid": "x", "source_type": "volume", "destination_type": "volume", "boot_index": 0,
                }]),
            ),
            400,
        ),
    ] {
        let answer = admin.post("/compute/v2.1/servers", body.clone()).await;
        assert_eq!(answer.status, status, "{body} {}", answer.body);
    }
    let state = memory.state();
    assert!(state.compute.servers.is_empty() && state.network.ports.is_empty());
}

#[tokio::test]
async fn anti_affinity_puts_servers_on_different_hosts() {
    let memory = Memory::new();
    let admin = Client::admin(&memory).await.at("compute 2.96");
    let (image, flavor, network) = furnish(&admin).await;
    let body = json!({"server_group": {"name": "apart", "policy": "anti-affinity"}});
    let group = admin.post("/compute/v2.1/os-server-groups", body).await.expect(200);
    assert_eq!(group.text("/server_group/policy"), "anti-affinity");
    let mut body = server(&image, &flavor, &network);
    body["os:scheduler_hints"] = json!({"group": group.text("/server_group/id")});
    let mut hosts = Vec::new();
    for _ in 0..3 {
        let created = admin.post("/compute/v2.1/servers", body.clone()).await.expect(202);
        let path = format!("/compute/v2.1/servers/{}", created.text("/server/id"));
        let shown = admin.get(&path).await.expect(200);
        hosts.push(shown.body["server"]["OS-EXT-SRV-ATTR:host"].clone());
    }
    assert_ne!(hosts[0], hosts[1]);
    assert_eq!(hosts[2], Value::Null, "a third host there is not");
}

#[tokio::test]
async fn several_servers_of_one_request_are_numbered_and_bounded_by_quota() {
    let memory = Memory::new();
    let admin = Client::admin(&memory).await;
    let (image, flavor, network) = furnish(&admin).await;
    let member = tenant(&memory, "alpha", "member").await;
    let project = memory.state().identity.projects.values().find(|p| p.name == "alpha").cloned();
    let quota = format!("/compute/v2.1/os-quota-sets/{}", project.unwrap().id);
    admin.put(&quota, json!({"quota_set": {"instances": 3}})).await.expect(200);
    let mut body = server(&image, &flavor, &network);
    body["server"]["min_count"] = json!(2);
    body["server"]["max_count"] = json!(5);
    member.post("/compute/v2.1/servers", body.clone()).await.expect(202);
    let listed = member.get("/compute/v2.1/servers?sort_key=display_name&sort_dir=asc").await;
    let servers = listed.expect(200).body["servers"].as_array().unwrap().clone();
    let names: Vec<_> = servers.iter().map(|server| server["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["one-1", "one-2", "one-3"]);
    let answer = member.post("/compute/v2.1/servers", body).await.expect(403);
    assert!(answer.text("/forbidden/message").contains("Quota exceeded"));
    assert_eq!(memory.state().compute.servers.len(), 3, "what was begun is taken back");
    let detail = admin.get(&format!("{quota}/detail")).await.expect(200);
    assert_eq!(detail.body["quota_set"]["instances"]["in_use"], 3);
    member.put(&quota, json!({"quota_set": {"instances": 99}})).await.expect(403);
}

#[tokio::test]
async fn servers_are_found_by_name_and_listed_in_pages() {
    let memory = Memory::new();
    let admin = Client::admin(&memory).await;
    let (image, flavor, network) = furnish(&admin).await;
    for name in ["web-1", "web-2", "db-1"] {
        let mut body = server(&image, &flavor, &network);
        body["server"]["name"] = json!(name);
        admin.post("/compute/v2.1/servers", body).await.expect(202);
    }
    let count =
        |answer: memory::Answer| answer.expect(200).body["servers"].as_array().unwrap().len();
    assert_eq!(count(admin.get("/compute/v2.1/servers/detail?name=web").await), 2);
    assert_eq!(
        count(admin.get("/compute/v2.1/servers?name=None&status=None&deleted=False").await),
        3
    );
    assert_eq!(count(admin.get("/compute/v2.1/servers?status=ACTIVE").await), 0);
    let first = admin.get("/compute/v2.1/servers?limit=2").await.expect(200);
    let next = first.text("/servers_links/0/href");
    let next = next.strip_prefix("https://cloud.test:8774").unwrap();
    assert_eq!(count(admin.get(next).await), 1);
    let member = tenant(&memory, "alpha", "member").await;
    assert_eq!(count(member.get("/compute/v2.1/servers?all_tenants=1").await), 0);
}

#[tokio::test]
async fn a_volume_in_use_is_not_attached_twice() {
    use controller::state::Command;
    use controller::state::volume::VolumeCommand;
    let memory = Memory::new();
    let admin = Client::admin(&memory).await.at("compute 2.89");
    let (image, flavor, network) = furnish(&admin).await;
    let created = admin.post("/compute/v2.1/servers", server(&image, &flavor, &network)).await;
    let id = created.expect(202).text("/server/id");
    memory.start(&id);
    let project = memory.state().compute.servers[id.as_str()].project_id.clone();
    let body = json!({"volume": {"size": 1, "name": "v"}});
    let volume = admin.at("volume 3.0").post(&format!("/volume/v3/{project}/volumes"), body).await;
    let volume = volume.expect(202).text("/volume/id");
    let path = format!("/compute/v2.1/servers/{id}/os-volume_attachments");
    let body = json!({"volumeAttachment": {"volumeId": volume, "device": null}});
    admin.post(&path, body.clone()).await.expect(400);
    memory.must(Command::Volume(VolumeCommand::Created(volume.as_str().into())));
    let attached = admin.post(&path, body.clone()).await.expect(200);
    assert_eq!(attached.text("/volumeAttachment/device"), "/dev/vdb");
    assert!(attached.body["volumeAttachment"].get("id").is_none(), "2.89 has attachment_id");
    admin.post(&path, body).await.expect(400);
    let unknown = json!({"volumeAttachment": {"volumeId": "none"}});
    admin.post(&path, unknown).await.expect(404);
    let generation = memory.state().volume.volumes[volume.as_str()].generation;
    let observed = VolumeCommand::Attached { volume_id: volume.as_str().into(), generation };
    memory.must(Command::Volume(observed));
    let listed = admin.get(&path).await.expect(200);
    assert_eq!(listed.text("/volumeAttachments/0/volumeId"), volume);
    admin.delete(&format!("{path}/{volume}")).await.expect(202);
    admin.delete(&format!("{path}/none")).await.expect(404);
}

/// A running server on a host that is then silent, and another host that holds its image.
async fn on_a_failed_host(memory: &Arc<Memory>, admin: &Client) -> (String, String) {
    let (image, flavor, network) = furnish(admin).await;
    let held = ImageCommand::HeldBy { id: image.as_str().into(), host: HostId(2) };
    memory.must(Command::Image(held));
    let body = server(&image, &flavor, &network);
    let created = admin.post("/compute/v2.1/servers", body).await.expect(202);
    let id = created.text("/server/id");
    memory.start(&id);
    let shown = admin.get(&format!("/compute/v2.1/servers/{id}")).await.expect(200);
    let host = shown.text("/server/OS-EXT-SRV-ATTR:host");
    memory.silence(host.trim_start_matches("node").parse().unwrap());
    (id, host)
}

#[tokio::test]
async fn a_server_is_evacuated_once_its_host_is_declared_dead() {
    let memory = Memory::new();
    let admin = Client::admin(&memory).await.at("compute 2.90");
    let (id, host) = on_a_failed_host(&memory, &admin).await;
    let action = format!("/compute/v2.1/servers/{id}/action");
    let evacuate = json!({"evacuate": {}});
    let answer = admin.post(&action, evacuate.clone()).await.expect(400);
    assert_eq!(
        answer.text("/badRequest/message"),
        format!("Compute service of {host} is still in use.")
    );
    let service = admin.get(&format!("/compute/v2.1/os-services?host={host}")).await.expect(200);
    let service = service.text("/services/0/id");
    let down = json!({"forced_down": true});
    let path = format!("/compute/v2.1/os-services/{service}");
    let answer = admin.put(&path, down).await.expect(200);
    assert_eq!(answer.body["service"]["forced_down"], true);
    for (wrong, status) in [
        (json!({"evacuate": {"host": host}}), 400),
        (json!({"evacuate": {"host": "nowhere"}}), 404),
        (json!({"evacuate": {"onSharedStorage": false}}), 400),
        (json!({"evacuate": {"force": true}}), 400),
        (json!({"evacuate": {"speed": "high"}}), 400),
    ] {
        let answer = admin.post(&action, wrong.clone()).await;
        assert_eq!(answer.status, status, "{wrong}: {}", answer.body);
    }
    let answer = admin.post(&action, evacuate.clone()).await.expect(200);
    assert!(answer.bytes.is_empty());
    let shown = admin.get(&format!("/compute/v2.1/servers/{id}")).await.expect(200);
    assert_eq!(shown.text("/server/status"), "REBUILD");
    assert_eq!(shown.text("/server/OS-EXT-STS:task_state"), "rebuilding");
    assert_ne!(shown.text("/server/OS-EXT-SRV-ATTR:host"), host);
    memory.start(&id);
    let shown = admin.get(&format!("/compute/v2.1/servers/{id}")).await.expect(200);
    assert_eq!(shown.text("/server/status"), "ACTIVE");
    let member = tenant(&memory, "alpha", "member").await.at("compute 2.90");
    member.post(&action, evacuate).await.expect(404);
}

#[tokio::test]
async fn an_old_evacuation_answers_a_password_and_a_new_one_leaves_the_server_stopped() {
    for version in ["compute 2.1", "compute 2.95"] {
        let memory = Memory::new();
        let admin = Client::admin(&memory).await.at(version);
        let (id, host) = on_a_failed_host(&memory, &admin).await;
        let down = json!({"host": host, "binary": "nova-compute", "forced_down": true});
        let old = admin.at("compute 2.11");
        old.put("/compute/v2.1/os-services/force-down", down).await.expect(200);
        let old = version == "compute 2.1";
        let asked = if old { json!({"onSharedStorage": "False"}) } else { json!({}) };
        let action = format!("/compute/v2.1/servers/{id}/action");
        let answer = admin.post(&action, json!({"evacuate": asked})).await.expect(200);
        assert_eq!(answer.body["adminPass"].is_string(), old, "{version}");
        let state = memory.state();
        let server = &state.compute.servers[&ServerId::from(id.as_str())];
        assert_eq!(server.desired == Desired::Stopped, !old, "{version}");
    }
}

#[tokio::test]
async fn a_compute_service_is_disabled_with_a_reason_and_enabled_again() {
    let memory = Memory::new();
    let admin = Client::admin(&memory).await.at("compute 2.53");
    let services = admin.get("/compute/v2.1/os-services").await.expect(200);
    let path = format!("/compute/v2.1/os-services/{}", services.text("/services/1/id"));
    let body = json!({"status": "disabled", "disabled_reason": "repair"});
    let answer = admin.put(&path, body).await.expect(200);
    assert_eq!(answer.text("/service/disabled_reason"), "repair");
    assert_eq!(answer.text("/service/host"), "node2");
    let answer = admin.put(&path, json!({"status": "enabled"})).await.expect(200);
    assert_eq!(answer.body["service"]["disabled_reason"], Value::Null);
    for wrong in [
        json!({}),
        json!({"status": "gone"}),
        json!({"status": "enabled", "disabled_reason": "x"}),
        json!({"status": "enabled", "host": "node2"}),
    ] {
        admin.put(&path, wrong).await.expect(400);
    }
    admin.put("/compute/v2.1/os-services/x", json!({"status": "enabled"})).await.expect(404);
    let old = admin.at("compute 2.1");
    let named = json!({"host": "node2", "binary": "nova-compute", "disabled_reason": "old"});
    let answer = old.put("/compute/v2.1/os-services/disable-log-reason", named).await.expect(200);
    assert_eq!(answer.text("/service/status"), "disabled");
    let named = json!({"host": "node9", "binary": "nova-compute"});
    old.put("/compute/v2.1/os-services/enable", named).await.expect(404);
}

#[tokio::test]
async fn an_administrator_marks_hosts_for_evacuation() {
    let memory = Memory::new();
    let admin = Client::admin(&memory).await;
    let path = "/compute/v2.1/os-trine-hosts/node2";
    let shown = admin.get(path).await.expect(200);
    assert_eq!(shown.body["host"]["evacuate_on_failure"], false);
    let mark = json!({"host": {"evacuate_on_failure": true}});
    let answer = admin.put(path, mark.clone()).await.expect(200);
    assert_eq!(answer.body["host"]["evacuate_on_failure"], true);
    let listed = admin.get("/compute/v2.1/os-trine-hosts").await.expect(200);
    assert_eq!(listed.body["hosts"][1]["evacuate_on_failure"], true);
    admin.put("/compute/v2.1/os-trine-hosts/9", mark).await.expect(404);
}
