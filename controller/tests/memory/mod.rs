//! The real state machine and planner behind the real router, without Raft and hosts:
//! commands are applied in memory, images are kept in memory, consoles are given.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use axum::Router;
use axum::body::Body;
use bytes::Bytes;
use controller::api::{
    ApiConfig, BodyStream, Cloud, CloudError, PasswordCost, ProposeError, SubState, TokenKeys,
    Unavailable, UploadedImage, hash_password, router,
};
use controller::ids::{HostId, ImageId, ServerId};
use controller::plan::{InFlight, Liveness, prepare};
use controller::seal::Sealer;
use controller::state::cluster::{Capacity, ClusterCommand, HostAddresses, Init, NewHost};
use controller::state::compute::{ComputeCommand, Server};
use controller::state::image::{Image, ImageContent};
use controller::state::{Command, FEATURE_LEVEL, Outcome, State};
use futures::StreamExt;
use http::{Method, Request, StatusCode};
use serde_json::{Value, json};
use tower::ServiceExt;

pub(crate) const PASSWORD: &str = "correct horse";
pub(crate) const COST: PasswordCost = PasswordCost { memory_kib: 64, passes: 1 };

#[derive(Default)]
struct Inner {
    state: State,
    in_flight: InFlight,
    index: u64,
    now_ms: u64,
    images: BTreeMap<ImageId, Bytes>,
    consoles: BTreeMap<ServerId, String>,
    sub_states: BTreeMap<ServerId, SubState>,
    down: bool,
    silent: BTreeSet<HostId>,
}

/// The cloud.
pub(crate) struct Memory {
    inner: Mutex<Inner>,
    sealer: Sealer,
    liveness: Liveness,
}

pub(crate) fn host(name: &str, port: u16) -> NewHost {
    let address = |offset| SocketAddr::from(([127, 0, 0, 1], port + offset));
    NewHost {
        name: name.to_owned(),
        addresses: HostAddresses {
            api: address(0),
            raft: address(1),
            storage: address(2),
            tunnel: address(3),
            server_name: name.to_owned(),
        },
        capacity: Capacity { vcpus: 4, ram_mib: 4096, disk_gib: 100 },
        feature_level: FEATURE_LEVEL,
    }
}

impl Memory {
    pub(crate) fn new() -> Arc<Self> {
        let memory = Self {
            inner: Mutex::new(Inner { now_ms: 1_767_225_600_000, ..Inner::default() }),
            sealer: Sealer::new([5; 32]),
            liveness: Liveness { up: [1, 2].map(HostId).into() },
        };
        let init = Init {
            cluster_id: "6a3bd8a4-94d5-4a10-9a80-0d9bdd3e1c0e".to_owned(),
            name: "test".to_owned(),
            region: "RegionOne".to_owned(),
            host: host("node1", 1000),
            admin_name: "admin".to_owned(),
            admin_password_hash: hash_password(PASSWORD, COST).unwrap(),
            floating_pool: "127.77.0.0/24".parse().unwrap(),
            feature_level: FEATURE_LEVEL,
        };
        memory.must(Command::Cluster(ClusterCommand::Init(Box::new(init))));
        let hash = "00".repeat(32);
        let token = ClusterCommand::IssueJoinToken {
            hash: hash.clone(),
            expires_ms: u64::MAX,
            replaces: None,
        };
        memory.must(Command::Cluster(token));
        let host = Box::new(host("node2", 2000));
        let join = ClusterCommand::RegisterHost { token_hash: hash, host };
        memory.must(Command::Cluster(join));
        Arc::new(memory)
    }

    /// The host is no longer heard.
    pub(crate) fn silence(&self, host: u64) {
        self.inner.lock().unwrap().silent.insert(HostId(host));
    }

    fn apply(&self, id: [u8; 16], mut command: Command) -> Result<Outcome, ProposeError> {
        let liveness = self.liveness();
        let inner = &mut *self.inner.lock().unwrap();
        prepare(&inner.state, &liveness, &mut inner.in_flight, &mut command);
        // Through bytes, as in the log.
        let command = Command::decode(&command.encode()).unwrap();
        inner.index += 1;
        inner.now_ms += 1000;
        let before = inner.state.clone();
        let outcome = inner.state.apply(inner.index, inner.now_ms, id, &command);
        if outcome.is_err() {
            // A refusal leaves everything but its own record as it was.
            assert_eq!(before.compute, inner.state.compute);
            assert_eq!(before.network, inner.state.network);
        }
        inner.state.check_invariants().unwrap();
        outcome.map_err(ProposeError::Rejected)
    }

    /// Applies a command that has to be accepted: what an agent reports, for example.
    pub(crate) fn must(&self, command: Command) -> Outcome {
        self.apply(*uuid::Uuid::new_v4().as_bytes(), command).unwrap()
    }

    pub(crate) fn state(&self) -> State {
        self.inner.lock().unwrap().state.clone()
    }

    /// The host's agent reports that the server runs.
    pub(crate) fn start(&self, id: &str) {
        let id = ServerId::from(id);
        let generation = self.state().compute.servers[&id].generation;
        self.must(Command::Compute(ComputeCommand::ServerStarted { id, generation }));
    }

    pub(crate) fn say(&self, id: &str, text: &str) {
        self.inner.lock().unwrap().consoles.insert(ServerId::from(id), text.to_owned());
    }

    pub(crate) fn reached(&self, id: &str, sub_state: SubState) {
        self.inner.lock().unwrap().sub_states.insert(ServerId::from(id), sub_state);
    }

    pub(crate) fn lose_quorum(&self) {
        self.inner.lock().unwrap().down = true;
    }

    pub(crate) fn pass_time(&self, ms: u64) {
        self.inner.lock().unwrap().now_ms += ms;
    }
}

#[async_trait]
impl Cloud for Memory {
    async fn read(&self) -> Result<State, Unavailable> {
        let inner = self.inner.lock().unwrap();
        if inner.down {
            return Err(Unavailable("no quorum".to_owned()));
        }
        Ok(inner.state.clone())
    }

    async fn propose(&self, id: [u8; 16], command: Command) -> Result<Outcome, ProposeError> {
        self.apply(id, command)
    }

    async fn console_output(
        &self,
        server: &Server,
        lines: Option<usize>,
    ) -> Result<String, CloudError> {
        let inner = self.inner.lock().unwrap();
        let text = inner.consoles.get(&server.id);
        let text = text.ok_or_else(|| CloudError::NotFound("nothing yet".to_owned()))?;
        let all: Vec<&str> = text.split_inclusive('\n').collect();
        Ok(all[all.len() - lines.unwrap_or(all.len()).min(all.len())..].concat())
    }

    async fn upload_image(
        &self,
        image: &Image,
        mut body: BodyStream,
    ) -> Result<UploadedImage, CloudError> {
        let mut bytes = Vec::new();
        while let Some(piece) = body.next().await {
            let piece = piece.map_err(|error| CloudError::Invalid(error.to_string()))?;
            bytes.extend_from_slice(&piece);
        }
        if bytes.is_empty() {
            return Err(CloudError::Invalid("the image is empty".to_owned()));
        }
        let size_bytes = bytes.len() as u64;
        self.inner.lock().unwrap().images.insert(image.id.clone(), bytes.into());
        let content = ImageContent {
            size_bytes,
            virtual_size_bytes: size_bytes,
            md5: "0".repeat(32),
            sha512: "0".repeat(128),
            kind: "elf".to_owned(),
        };
        Ok(UploadedImage { content, host: HostId(1) })
    }

    async fn download_image(&self, image: &Image) -> Result<BodyStream, CloudError> {
        let bytes = self.inner.lock().unwrap().images.get(&image.id).cloned();
        let bytes = bytes.ok_or_else(|| CloudError::NotFound("no content".to_owned()))?;
        Ok(Box::pin(futures::stream::iter([Ok(bytes)])))
    }

    async fn volatile(&self, server: &ServerId) -> Option<SubState> {
        self.inner.lock().unwrap().sub_states.get(server).copied()
    }

    fn host(&self) -> HostId {
        HostId(1)
    }

    fn liveness(&self) -> Liveness {
        let mut liveness = self.liveness.clone();
        liveness.up.retain(|host| !self.inner.lock().unwrap().silent.contains(host));
        liveness
    }

    fn now_ms(&self) -> u64 {
        self.inner.lock().unwrap().now_ms
    }

    fn sealer(&self) -> &Sealer {
        &self.sealer
    }

    fn token_keys(&self) -> TokenKeys {
        TokenKeys { keys: vec![[9; 32]] }
    }
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: http::HeaderMap,
    pub(crate) body: Value,
    pub(crate) bytes: Bytes,
}

impl Answer {
    /// The answer, if it has this status.
    #[track_caller]
    pub(crate) fn expect(self, status: u16) -> Self {
        assert_eq!(self.status.as_u16(), status, "{}", self.body);
        self
    }

    pub(crate) fn text(&self, pointer: &str) -> String {
        let value = self.body.pointer(pointer);
        value.and_then(Value::as_str).unwrap_or_else(|| panic!("{pointer} in {}", self.body)).into()
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

/// A client with or without a token.
#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) router: Router,
    pub(crate) token: Option<String>,
    pub(crate) version: Option<&'static str>,
}

pub(crate) fn api(memory: &Arc<Memory>) -> Router {
    let mut config = ApiConfig::new(SocketAddr::from(([127, 0, 0, 1], 1)));
    config.password_cost = COST;
    router(Arc::clone(memory) as Arc<dyn Cloud>, config)
}

impl Client {
    pub(crate) fn anonymous(memory: &Arc<Memory>) -> Self {
        Self { router: api(memory), token: None, version: None }
    }

    /// A client with a token of the user in the project.
    pub(crate) async fn of(memory: &Arc<Memory>, user: &str, password: &str, scope: Value) -> Self {
        let mut client = Self::anonymous(memory);
        let body = credentials(user, password, Some(scope));
        let answer = client.post("/identity/v3/auth/tokens", body).await.expect(201);
        client.token = Some(answer.header("x-subject-token").to_owned());
        client
    }

    pub(crate) async fn admin(memory: &Arc<Memory>) -> Self {
        Self::of(memory, "admin", PASSWORD, in_project("admin")).await
    }

    pub(crate) fn at(&self, version: &'static str) -> Self {
        Self { version: Some(version), ..self.clone() }
    }

    pub(crate) async fn send(&self, method: Method, path: &str, kind: &str, body: Body) -> Answer {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "cloud.test:8774")
            .header("content-type", kind);
        if let Some(token) = &self.token {
            request = request.header("x-auth-token", token);
        }
        if let Some(version) = self.version {
            request = request.header("openstack-api-version", version);
        }
        let response = self.router.clone().oneshot(request.body(body).unwrap()).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap();
        let body = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
        Answer { status: parts.status, headers: parts.headers, body, bytes }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(Method::GET, path, "application/json", Body::empty()).await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Answer {
        self.send(Method::POST, path, "application/json", Body::from(body.to_string())).await
    }

    pub(crate) async fn put(&self, path: &str, body: Value) -> Answer {
        self.send(Method::PUT, path, "application/json", Body::from(body.to_string())).await
    }

    pub(crate) async fn patch(&self, path: &str, body: Value) -> Answer {
        self.send(Method::PATCH, path, "application/json", Body::from(body.to_string())).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Answer {
        self.send(Method::DELETE, path, "application/json", Body::empty()).await
    }
}

pub(crate) fn in_project(name: &str) -> Value {
    json!({"project": {"name": name, "domain": {"id": "default"}}})
}

/// The body that asks for a token.
pub(crate) fn credentials(user: &str, password: &str, scope: Option<Value>) -> Value {
    let mut body = json!({"auth": {"identity": {
        "methods": ["password"],
        "password": {"user": {
            "name": user, "domain": {"id": "default"}, "password": password,
        }},
    }}});
    if let Some(scope) = scope {
        body["auth"]["scope"] = scope;
    }
    body
}

/// Makes a project with one user who has `role` there, and answers the user's client.
pub(crate) async fn tenant(memory: &Arc<Memory>, name: &str, role: &str) -> Client {
    let admin = Client::admin(memory).await;
    let listed = admin.get(&format!("/identity/v3/projects?name={name}")).await.expect(200);
    let project = match listed.body["projects"][0]["id"].as_str() {
        Some(id) => id.to_owned(),
        None => {
            let body = json!({"project": {"name": name}});
            admin.post("/identity/v3/projects", body).await.expect(201).text("/project/id")
        }
    };
    let user = format!("{name}-{role}");
    let body = json!({"user": {"name": user, "password": PASSWORD}});
    let user_id = admin.post("/identity/v3/users", body).await.expect(201).text("/user/id");
    let roles = admin.get(&format!("/identity/v3/roles?name={role}")).await.expect(200);
    let role_id = roles.text("/roles/0/id");
    let path = format!("/identity/v3/projects/{project}/users/{user_id}/roles/{role_id}");
    admin.put(&path, json!({})).await.expect(204);
    Client::of(memory, &user, PASSWORD, in_project(name)).await
}
