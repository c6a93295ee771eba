"""What the errors say."""

from aftercommit.errors import PoolExhausted


def test_the_error_of_a_dry_pool_names_no_page_that_is_not_there():
    """It is one of SQLAlchemy's errors, too, which add a link for their code; ours has its page elsewhere."""
    error = PoolExhausted("All are in use.", pool="request")

    assert str(error) == "All are in use. [AC203]"
