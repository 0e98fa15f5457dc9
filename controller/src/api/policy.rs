//! Policy: each action and who may do it.
//!
//! The role rule is checked here, before a handler looks at the request's body. Whose
//! object it is, is the handler's question (`Context::sees`): a foreign project's object
//! is not found.

/// Who may do something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Whoever has a token, wherever it is good.
    Authenticated,
    /// Who may read in the token's project.
    Reader,
    /// Who may change things in the token's project.
    Member,
    /// An administrator, or a reader of the whole system.
    AdminReader,
    /// An administrator.
    Admin,
}

/// Something that the API does, by OpenStack's name for it.
#[derive(Debug, PartialEq, Eq)]
pub struct Action {
    /// The name that operators know from policy files.
    pub name: &'static str,
    /// Who may do it.
    pub rule: Rule,
}

macro_rules! actions {
    ($($constant:ident = $name:literal, $rule:ident;)*) => {
        $(pub(crate) const $constant: &Action = &Action { name: $name, rule: Rule::$rule };)*
        /// Every row of the table.
        #[cfg(test)]
        pub(super) const TABLE: &[&Action] = &[$($constant),*];
    };
}

actions! {
    // Identity. Where a user may look at what is its own, the handler narrows.
    TOKEN_VALIDATE = "identity:validate_token", Authenticated;
    AUTH_PROJECTS = "identity:get_auth_projects", Authenticated;
    AUTH_DOMAINS = "identity:get_auth_domains", Authenticated;
    AUTH_SYSTEM = "identity:get_auth_system", Authenticated;
    AUTH_CATALOG = "identity:get_auth_catalog", Authenticated;
    DOMAIN_LIST = "identity:list_domains", AdminReader;
    DOMAIN_GET = "identity:get_domain", Authenticated;
    DOMAIN_CREATE = "identity:create_domain", Admin;
    DOMAIN_UPDATE = "identity:update_domain", Admin;
    DOMAIN_DELETE = "identity:delete_domain", Admin;
    PROJECT_LIST = "identity:list_projects", AdminReader;
    PROJECT_GET = "identity:get_project", Authenticated;
    PROJECT_CREATE = "identity:create_project", Admin;
    PROJECT_UPDATE = "identity:update_project", Admin;
    PROJECT_DELETE = "identity:delete_project", Admin;
    USER_PROJECTS = "identity:list_user_projects", Authenticated;
    USER_LIST = "identity:list_users", AdminReader;
    USER_GET = "identity:get_user", Authenticated;
    USER_CREATE = "identity:create_user", Admin;
    USER_UPDATE = "identity:update_user", Admin;
    USER_PASSWORD = "identity:change_password", Authenticated;
    USER_DELETE = "identity:delete_user", Admin;
    ROLE_LIST = "identity:list_roles", AdminReader;
    ROLE_GET = "identity:get_role", AdminReader;
    ROLE_CREATE = "identity:create_role", Admin;
    ROLE_UPDATE = "identity:update_role", Admin;
    ROLE_DELETE = "identity:delete_role", Admin;
    GRANT_LIST = "identity:list_grants", AdminReader;
    GRANT_CHECK = "identity:check_grant", AdminReader;
    GRANT_CREATE = "identity:create_grant", Admin;
    GRANT_REVOKE = "identity:revoke_grant", Admin;
    ASSIGNMENT_LIST = "identity:list_role_assignments", Authenticated;
    REGION_LIST = "identity:list_regions", Authenticated;
    SERVICE_LIST = "identity:list_services", AdminReader;
    ENDPOINT_LIST = "identity:list_endpoints", AdminReader;

    // Images.
    IMAGE_LIST = "get_images", Reader;
    IMAGE_GET = "get_image", Reader;
    IMAGE_SCHEMA = "get_image_schema", Authenticated;
    IMAGE_CREATE = "add_image", Member;
    IMAGE_UPDATE = "modify_image", Member;
    IMAGE_DELETE = "delete_image", Member;
    IMAGE_UPLOAD = "upload_image", Member;
    IMAGE_DOWNLOAD = "download_image", Reader;

    // Compute.
    FLAVOR_LIST = "os_compute_api:os-flavor-access", Reader;
    FLAVOR_GET = "os_compute_api:flavors:show", Reader;
    FLAVOR_CREATE = "os_compute_api:os-flavor-manage:create", Admin;
    FLAVOR_UPDATE = "os_compute_api:os-flavor-manage:update", Admin;
    FLAVOR_DELETE = "os_compute_api:os-flavor-manage:delete", Admin;
    FLAVOR_SPECS_LIST = "os_compute_api:os-flavor-extra-specs:index", Reader;
    FLAVOR_SPECS_CHANGE = "os_compute_api:os-flavor-extra-specs:update", Admin;
    FLAVOR_ACCESS_LIST = "os_compute_api:os-flavor-access:list", Admin;
    FLAVOR_ACCESS_CHANGE = "os_compute_api:os-flavor-access:add_tenant_access", Admin;
    KEYPAIR_LIST = "os_compute_api:os-keypairs:index", Authenticated;
    KEYPAIR_GET = "os_compute_api:os-keypairs:show", Authenticated;
    KEYPAIR_CREATE = "os_compute_api:os-keypairs:create", Authenticated;
    KEYPAIR_DELETE = "os_compute_api:os-keypairs:delete", Authenticated;
    GROUP_LIST = "os_compute_api:os-server-groups:index", Reader;
    GROUP_GET = "os_compute_api:os-server-groups:show", Reader;
    GROUP_CREATE = "os_compute_api:os-server-groups:create", Member;
    GROUP_DELETE = "os_compute_api:os-server-groups:delete", Member;
    SERVER_LIST = "os_compute_api:servers:index", Reader;
    SERVER_DETAIL = "os_compute_api:servers:detail", Reader;
    SERVER_GET = "os_compute_api:servers:show", Reader;
    SERVER_CREATE = "os_compute_api:servers:create", Member;
    SERVER_UPDATE = "os_compute_api:servers:update", Member;
    SERVER_DELETE = "os_compute_api:servers:delete", Member;
    SERVER_ACTION = "os_compute_api:servers:action", Reader;
    SERVER_METADATA_GET = "os_compute_api:server-metadata:index", Reader;
    SERVER_METADATA_CHANGE = "os_compute_api:server-metadata:update", Member;
    SERVER_TAGS_GET = "os_compute_api:os-server-tags:index", Reader;
    SERVER_TAGS_CHANGE = "os_compute_api:os-server-tags:update", Member;
    SERVER_ADDRESSES = "os_compute_api:ips:index", Reader;
    SERVER_GROUPS_GET = "os_compute_api:os-security-groups:list", Reader;
    INTERFACE_LIST = "os_compute_api:os-attach-interfaces:list", Reader;
    INTERFACE_GET = "os_compute_api:os-attach-interfaces:show", Reader;
    ATTACHMENT_LIST = "os_compute_api:os-volumes-attachments:index", Reader;
    ATTACHMENT_GET = "os_compute_api:os-volumes-attachments:show", Reader;
    ATTACHMENT_CREATE = "os_compute_api:os-volumes-attachments:create", Member;
    ATTACHMENT_DELETE = "os_compute_api:os-volumes-attachments:delete", Member;
    HYPERVISOR_LIST = "os_compute_api:os-hypervisors:list", AdminReader;
    HYPERVISOR_GET = "os_compute_api:os-hypervisors:show", AdminReader;
    COMPUTE_SERVICE_LIST = "os_compute_api:os-services:list", AdminReader;
    COMPUTE_SERVICE_UPDATE = "os_compute_api:os-services:update", Admin;
    TRINE_HOST_LIST = "trine:hosts:list", AdminReader;
    TRINE_HOST_UPDATE = "trine:hosts:update", Admin;
    ZONE_LIST = "os_compute_api:os-availability-zone:list", Authenticated;
    ZONE_DETAIL = "os_compute_api:os-availability-zone:detail", AdminReader;
    QUOTA_GET = "os_compute_api:os-quota-sets:show", Reader;
    QUOTA_UPDATE = "os_compute_api:os-quota-sets:update", Admin;
    LIMITS_GET = "os_compute_api:limits", Reader;
    EXTENSION_LIST = "os_compute_api:extensions", Authenticated;

    // Block storage.
    VOLUME_VERSIONS = "volume_extension:versions", Authenticated;
    VOLUME_LIST = "volume:get_all", Reader;
    VOLUME_GET = "volume:get", Reader;
    VOLUME_CREATE = "volume:create", Member;
    VOLUME_UPDATE = "volume:update", Member;
    VOLUME_DELETE = "volume:delete", Member;
    VOLUME_ACTION = "volume_extension:volume_actions", Member;
    VOLUME_METADATA_GET = "volume:get_volume_metadata", Reader;
    VOLUME_METADATA_CHANGE = "volume:update_volume_metadata", Member;
    VOLUME_ZONE_LIST = "volume:availability_zone_list", Authenticated;
    VOLUME_SERVICE_LIST = "volume_extension:services:index", AdminReader;
    VOLUME_LIMITS = "limits_extension:used_limits", Reader;
    VOLUME_QUOTA_GET = "volume_extension:quotas:show", Reader;
    VOLUME_QUOTA_CHANGE = "volume_extension:quotas:update", Admin;

    // Networking.
    NETWORK_EXTENSION_LIST = "get_extension", Authenticated;
    NETWORK_LIST = "get_networks", Reader;
    NETWORK_GET = "get_network", Reader;
    NETWORK_CREATE = "create_network", Member;
    NETWORK_UPDATE = "update_network", Member;
    NETWORK_DELETE = "delete_network", Member;
    SUBNET_LIST = "get_subnets", Reader;
    SUBNET_GET = "get_subnet", Reader;
    SUBNET_CREATE = "create_subnet", Member;
    SUBNET_UPDATE = "update_subnet", Member;
    SUBNET_DELETE = "delete_subnet", Member;
    PORT_LIST = "get_ports", Reader;
    PORT_GET = "get_port", Reader;
    PORT_CREATE = "create_port", Member;
    PORT_UPDATE = "update_port", Member;
    PORT_DELETE = "delete_port", Member;
    SECURITY_GROUP_LIST = "get_security_groups", Reader;
    SECURITY_GROUP_GET = "get_security_group", Reader;
    SECURITY_GROUP_CREATE = "create_security_group", Member;
    SECURITY_GROUP_UPDATE = "update_security_group", Member;
    SECURITY_GROUP_DELETE = "delete_security_group", Member;
    FLOATING_IP_LIST = "get_floatingips", Reader;
    FLOATING_IP_GET = "get_floatingip", Reader;
    FLOATING_IP_CREATE = "create_floatingip", Member;
    FLOATING_IP_UPDATE = "update_floatingip", Member;
    FLOATING_IP_DELETE = "delete_floatingip", Member;
    SECURITY_RULE_LIST = "get_security_group_rules", Reader;
    SECURITY_RULE_GET = "get_security_group_rule", Reader;
    SECURITY_RULE_CREATE = "create_security_group_rule", Member;
    SECURITY_RULE_DELETE = "delete_security_group_rule", Member;
    PORT_FORWARDING_LIST = "get_floatingip_port_forwardings", Reader;
    PORT_FORWARDING_GET = "get_floatingip_port_forwarding", Reader;
    PORT_FORWARDING_CREATE = "create_floatingip_port_forwarding", Member;
    PORT_FORWARDING_DELETE = "delete_floatingip_port_forwarding", Member;
}

/// What handlers check beyond the route's row, for actions that share one route.
pub(crate) mod server_action {
    use super::{Action, Rule};

    /// Reading the console is for those who may change the server: it shows secrets.
    pub(crate) const CONSOLE_OUTPUT: &Action =
        &Action { name: "os_compute_api:os-console-output", rule: Rule::Member };
    /// Stop, start, reboot.
    pub(crate) const POWER: &Action =
        &Action { name: "os_compute_api:servers:start", rule: Rule::Member };
    /// Making a server anew on another host.
    pub(crate) const EVACUATE: &Action =
        &Action { name: "os_compute_api:os-evacuate", rule: Rule::Admin };
}
