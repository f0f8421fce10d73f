"""Known security advisories of engines like this one, SEC-01 to SEC-44, each with the tests that hold us against it.

The numbers are of the list of advisories that this engine is held against: one for each cause.
"""

from __future__ import annotations

import pytest
from named_tests import by_name, names_with

HOSTILE_BODIES = "test_every_hostile_body_gets_a_400_that_names_the_field_and_the_server_goes_on"
EVERY_ROUTE = "test_every_route_asks_for_a_key_unless_it_is_on_the_open_list"

TESTS: dict[int, tuple[str, ...]] = {
    # Code execution and unsafe decoding
    1: (
        "test_no_module_unpickles_evaluates_or_executes_what_it_reads",
        "test_sec_01_a_pickle_on_a_port_is_counted_as_malformed_and_never_loaded",
        "test_sec_01_a_pickle_on_the_nursery_s_pipe_is_refused_and_never_loaded",
        "test_sec_01_a_pickle_in_a_file_that_is_read_back_is_refused_and_never_loaded",
    ),
    4: (
        "test_pickled_weights_are_refused_with_advice_and_never_opened",
        "test_sec_04_a_safetensors_header_that_lies_is_refused_and_costs_no_memory",
        "test_sec_04_a_damaged_header_is_refused_or_means_a_file_that_is_whole",
    ),
    5: (
        "test_code_that_a_checkpoint_brings_is_not_run_unless_asked_for",
        "test_sec_05_without_assertions_no_code_of_a_checkpoint_runs_and_a_request_is_answered",
    ),
    8: (
        "test_f_43_a_file_cut_anywhere_or_damaged_behind_gives_what_came_before",
        "test_the_file_is_for_its_owner_alone_and_only_one_process_writes_it",
    ),
    9: (HOSTILE_BODIES,),
    10: (HOSTILE_BODIES, "test_hi_112_negative_ids_and_counts_and_numbers_out_of_64_bits_are_refused"),
    # Internal sockets
    11: (
        "test_sec_11_a_family_listens_where_it_says_and_nowhere_else",
        "test_tcp_without_keys_is_refused_beyond_loopback_even_if_plain_loopback_is_asked_for",
        "test_hi_107_a_peer_without_curve_gets_no_message_through",
        "test_hi_119_a_peer_that_never_reads_is_shed_and_the_others_are_served",
    ),
    12: (
        "test_hi_105_random_bytes_on_200_connections_reach_no_actor_are_counted_and_cost_their_connections",
        "test_hi_108_a_frame_longer_than_allowed_costs_the_connection_and_no_memory",
        "test_hi_109_messages_of_several_parts_are_dropped_and_counted",
        "test_hi_115_messages_of_a_dead_incarnation_are_ignored",
    ),
    13: (HOSTILE_BODIES,),
    # Authentication, routing, metadata
    14: (
        "test_any_of_the_keys_opens_and_nothing_else_does",
        "test_sec_14_keys_are_compared_as_digests_in_constant_time",
    ),
    15: ("test_what_the_host_header_says_does_not_change_who_may_enter", EVERY_ROUTE),
    16: (EVERY_ROUTE,),
    17: (
        "test_a_request_id_is_kept_if_it_is_harmless_and_made_otherwise",
        "test_sec_17_two_requests_of_one_id_at_once_do_not_touch_each_other",
    ),
    18: ("test_metrics_count_what_happened_and_their_labels_do_not_grow_with_what_clients_send",),
    19: ("test_a_local_server_without_keys_answers_to_local_names_only",),
    20: (
        "test_pages_of_other_sites_are_refused_unless_they_were_let_in",
        "test_a_local_server_without_keys_answers_to_local_names_only",
        "test_a_body_that_is_not_plain_json_is_refused_by_its_headers",
    ),
    # Denial of service and corruption by parameters
    21: (HOSTILE_BODIES,),
    22: (
        "test_a_list_of_prompts_is_admitted_whole_or_refused_whole",
        "test_requests_and_bytes_are_bounded_and_come_back_with_their_release",
    ),
    23: (
        "test_min_tokens_is_compared_with_the_context_where_max_tokens_is_open",
        "test_f_13_an_exception_in_any_handler_ends_every_request_and_is_told",
    ),
    24: (
        "test_tokens_are_those_of_a_naive_reference_of_the_whole_chain",
        "test_masks_that_exclude_everything_fail_the_row_and_no_other",
    ),
    25: (
        "test_an_id_outside_the_vocabulary_is_refused_by_name",
        "test_a_request_has_its_tokens_alone_among_churning_neighbours_and_after_preemption",
        "test_a_dropped_row_is_used_again_without_a_trace",
    ),
    26: (
        "test_malformed_http_gets_a_4xx_in_the_same_shape_without_the_bytes_that_were_sent",
        "test_clients_that_do_not_send_are_not_waited_for",
        "test_resets_leave_no_traceback",
    ),
    27: (
        "test_a_long_body_is_decoded_in_turns_to_the_same",
        "test_a_text_that_is_too_long_whatever_its_tokens_are_is_refused_without_tokenizing_it",
        "test_other_threads_run_while_a_long_text_is_worked_on",
    ),
    28: (HOSTILE_BODIES, "test_each_pair_of_salt_and_adapter_has_a_root_of_its_own"),
    29: ("test_sec_29_nothing_is_remembered_without_a_bound", "test_poisoned_prompts_are_told_apart_and_bounded"),
    # Templates and parsers
    34: (
        "test_json_errors_of_the_server_itself_tell_nothing_of_its_inside",
        "test_a_failure_in_the_middle_of_a_stream_is_an_event_without_internals_then_the_end",
        "test_an_error_never_gives_back_much_of_what_was_sent",
    ),
    35: (
        HOSTILE_BODIES,
        "test_a_template_is_sandboxed_and_its_failures_are_the_requests",
        "test_the_names_that_no_variable_may_have_are_those_of_transformers",
    ),
    36: ("test_sec_36_no_pattern_repeats_what_repeats",),
    # URLs and files
    37: ("test_sec_37_no_text_of_a_request_makes_the_server_call_anybody",),
    38: (HOSTILE_BODIES,),
    39: ("test_an_unknown_model_is_refused", "test_sec_39_no_name_of_a_request_is_looked_up_in_the_file_system"),
    # Caches that tenants share, dependencies
    41: ("test_other_salts_and_adapters_never_hit", "test_prompts_with_different_salts_share_nothing"),
    42: (
        "test_f_59_it_finds_exactly_the_blocks_of_equal_histories",
        "test_equal_tokens_after_another_history_are_another_block",
    ),
    43: (
        "test_sec_43_the_http_library_is_none_with_known_holes",
        "test_a_body_that_is_not_plain_json_is_refused_by_its_headers",
        "test_bytes_in_the_middle_of_a_request_are_never_taken_for_the_head_of_another",
    ),
    44: (EVERY_ROUTE,),
}

NO_SUCH_FEATURE = {
    2: "weights are never replaced while the server runs, so no route takes any, and nothing is unpickled at all",
    3: "no route takes code, and no processor of logits is named by a client",
    6: "no tools are parsed out of an answer: `tools` and `tool_choice` are refused",
    7: "messages between processes carry no handle of memory, and clients' bodies are decoded into types of their own",
    30: "no answer is bound to a schema, a grammar or an expression: such a `response_format` is refused",
    31: "no expression of a client is compiled",
    32: "no grammar is compiled",
    33: "there is no cache of compiled grammars",
    40: "no adapters are loaded",
}


@pytest.mark.parametrize("number", range(1, 45))
def test_each_advisory_has_tests_or_a_reason_why_it_cannot_concern_us(number: int) -> None:
    assert (number in TESTS) != (number in NO_SUCH_FEATURE)
    for name in TESTS.get(number, ()):
        assert name in by_name(), f"SEC-{number:02}: there is no test {name!r}"


def test_every_test_that_carries_a_number_is_in_the_table() -> None:
    for number in range(1, 45):
        for name in names_with(f"sec_{number:02}"):
            assert name in TESTS.get(number, ()), name
